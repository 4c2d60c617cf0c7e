r"""What zeros in a pattern cost: magnitude, Wanda, SparseGPT, DaSS, ALPS, and any of them refitted.

    python benchmarks/sparsity.py                                       # a quick look: 2:4 of the MLPs, one seed
    python benchmarks/sparsity.py --row "mine=wanda|hardware|reconstruct"

    python benchmarks/sparsity.py --split test --patterns 2:4 4:8 0.5 --scopes mlp all --seeds 0 1 2 --lambada all \
        --windows all                                                   # hours
    python benchmarks/sparsity.py --split test --bytes                  # zeros against a cut, at equal stored bytes
    ... --only-table                                                    # what is there of it

A row is NAME=METHOD|LAYOUT|REFIT. All rows have the same share of zeros in the same Linears and see the same tokens of
C4, another text than those they are judged on. `mlp` are the Linears of the MLPs, as in the paper of DaSS, whose code
leaves attention dense for Wanda and SparseGPT as well; `all` are all Linears of the blocks. Choose on `--split valid`
(the default); `test` is read once.

`--bytes` compares models that take equally many bytes where values have 16 bits and zeros are left out: two bytes for
each weight that is kept, and one bit for each place in a sparse Linear that says whether it is (at 2:4, the two bits
per kept weight of sparse tensor cores). The ratio of the structured cut is chosen so that the bytes come out alike.

Measurements are kept and continued as those of accuracy.py are.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import common
import torch
from accuracy import METRICS, Key, Metric, dtype_name, dtype_of, limit, measure_model, model_key, tasks
from evaluation import Task, sha256
from results import Results
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeprune import calibration as calibrating
from edgeprune.cli.stages import Stages
from edgeprune.groups import Keep, kept
from edgeprune.patterns import Pattern
from edgeprune.presets import PRESETS
from edgeprune.pruning import Settings, allocate, apply_plan, make_plan, model_groups
from edgeprune.refit import Mode
from edgeprune.shrink import linear_of, linear_shapes, parameters_removed, weight_of
from edgeprune.sources import Source, count_parameters, load, load_tokenizer, open_source
from edgeprune.sparsify import Layout, Scope, Sparsity, sparsify
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Cell, Report, Table, Verdict

ROWS = (
    "magnitude=magnitude|hardware|none",
    "Wanda=wanda|hardware|none",
    "SparseGPT=sparsegpt|hardware|none",
    "DaSS, paper's layout=dass|paper|none",
    "DaSS, hardware layout=dass|hardware|none",
    "DaSS, paper's layout + refit=dass|paper|least-squares",
    "Wanda + refit=wanda|hardware|least-squares",
    "SparseGPT + refit=sparsegpt|hardware|least-squares",
    "ALPS=alps|hardware|none",
    "ALPS + refit (default)=alps|hardware|least-squares",
    "ALPS + reconstruction=alps|hardware|reconstruct",
)
"""The rows of the full table."""

VALUE_BYTES, PLACE_BITS = 2, 1
"""Of a weight that is kept, and of a place of a sparse Linear."""

EQUAL_BYTES_SCOPES: tuple[tuple[str, Scope], ...] = (("2:4", "all"), ("7:16", "all"))
EQUAL_BYTES_RATIO = 0.2
RATIO_STEP = 0.005
EQUAL_BYTES_ALLOCATION = "protect"
"""What `judged` takes on SmolLM2; named, since a size is looked for over many ratios and judging takes minutes."""


@dataclass(frozen=True)
class Sparse:
    """A model to be measured: zeros, a structured cut before them, or a cut alone; and the calibration seed."""

    sparsity: Sparsity | None
    seed: int
    ratio: float = 0.0

    @property
    def title(self) -> str:
        """What progress calls it."""
        cut = f"{self.ratio:.1%} cut" if self.ratio else ""
        zeros = ""
        if self.sparsity:
            zeros = f"{self.sparsity.method} {self.sparsity.pattern} {self.sparsity.scope} {self.sparsity.layout}"
            zeros += f" {self.sparsity.refit}"
        return f"{', '.join(filter(None, (cut, zeros))) or 'dense'}, seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """What is measured, and how."""

    args: argparse.Namespace
    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    results: Results
    stages: Stages
    dtype: torch.dtype
    eval_dtype: torch.dtype
    text: Path

    def key(self, task: Task, made: Sparse | None) -> Key:
        """Everything that determines a measurement; None is the dense model."""
        key: Key = {"model": model_key(self.source), "eval_dtype": dtype_name(self.eval_dtype), **task.key()}
        if made is None:
            return key
        sparsity = None if made.sparsity is None else asdict(_same_as(made.sparsity))
        cut = asdict(self.structured(made.ratio)) if made.ratio else None
        return key | {
            "sparsity": sparsity,
            "cut": cut,
            "calibration": {
                "text": sha256(self.text),
                "sequences": self.args.calibration_sequences,
                "tokens": self.args.calibration_tokens,
                "seed": made.seed,
            },
            "dtype": dtype_name(self.dtype),
        }

    def structured(self, ratio: float) -> Settings:
        """The cut of the preset that `compress` takes by default, with one allocation."""
        preset = PRESETS["balanced"]
        return Settings(
            ratio,
            method=preset.method,
            allocation=EQUAL_BYTES_ALLOCATION,
            refit=cast("Mode", preset.refit),
            heads="auto",
        )

    def calibration(self, seed: int) -> calibrating.Calibration:
        """The calibration tokens of a seed."""
        return calibrating.gather(
            str(self.text),
            self.tokenizer,
            self.model,
            sequences=self.args.calibration_sequences,
            length_tokens=self.args.calibration_tokens,
            seed=seed,
        )

    def measure(self, made: Sparse | None) -> dict[str, float] | None:
        """The figures of a model by metric, measured if they are not there; None if they may not be measured."""
        left = [task for task in self.tasks if self.results.find(self.key(task, made)) is None]
        if left and self.args.only_table:
            return None
        if left:
            title = "dense" if made is None else made.title
            model = self.model if made is None else self.make(made)
            pairs = [(task, self.key(task, made)) for task in left]
            measure_model(model, self.tokenizer, pairs, self.eval_dtype, self.results, self.stages, title)
        found = {}
        for metric in METRICS:
            for task in self.tasks:
                record = self.results.find(self.key(task, made)) if task.name == metric.task else None
                if record is not None:
                    found[metric.title] = metric.value(record["result"])
        return found

    def make(self, made: Sparse) -> PreTrainedModel:
        """The model, cut and with its zeros."""
        model, calibration = copy.deepcopy(self.model), self.calibration(made.seed)
        with self.stages.counted(made.title) as advance:

            def told(_: str, done: int, total: int) -> None:
                advance(done, total)

            if made.ratio:
                settings = self.structured(made.ratio)
                plan, stats = make_plan(model, self.source.name, calibration, settings, dtype=self.dtype, progress=told)
                apply_plan(model, plan, stats.moments, calibration, dtype=self.dtype, progress=told)
            if made.sparsity:
                sparsify(model, made.sparsity, calibration, dtype=self.dtype, progress=told)
        return model


def main() -> Report:
    """Measure what is missing, and make the tables."""
    args = _arguments()
    text = common.data_file(args.data, common.CALIBRATION)
    source, stages = open_source(args.model), Stages(quiet=False)
    with stages.stage("load the model"):
        model, tokenizer = load(source), load_tokenizer(source)
    bench = Bench(
        args,
        source,
        model,
        tokenizer,
        tasks(args),
        Results(args.results),
        stages,
        dtype_of(args.dtype),
        dtype_of(args.eval_dtype),
        text,
    )
    tables, verdicts = (_bytes_table(bench), []) if args.bytes else _pattern_tables(bench)
    return Report(
        f"Zeros in {Path(source.name).name}",
        this_machine(),
        tuple(tables),
        tuple(verdicts),
        {"arguments": json.loads(json.dumps(vars(args), default=str))},
    )


def _pattern_tables(bench: Bench) -> tuple[list[Table], list[Verdict]]:
    """One table for each scope and pattern."""
    args = bench.args
    dense, tables, verdicts = bench.measure(None), [], []
    for scope in args.scopes:
        for pattern in args.patterns:
            cells, best = [], {}
            for text in args.row or ROWS:
                name, sparsity = _parse_row(text, pattern, scope)
                found = [bench.measure(Sparse(sparsity, seed)) for seed in args.seeds]
                cells.append(_cells(bench, name, found, dense))
                if figures := [each["perplexity"] for each in found if each]:
                    best[name] = fmean(figures)
            title = f"{pattern}, {'MLPs' if scope == 'mlp' else 'all Linears of the blocks'}"
            tables.append(Table(title, _columns(bench), tuple(cells), (), _notes(bench)))
            verdicts += [Verdict(f"{title}: {order}") for order in _orders(best)]
    return tables, verdicts


def _orders(best: dict[str, float]) -> Iterator[str]:
    """The papers' order, and the best row."""
    if len(best) > 1:
        yield f"best is {min(best, key=lambda name: best[name])}"
    dass, others = best.get("DaSS, paper's layout"), [best.get("Wanda"), best.get("SparseGPT")]
    if dass is not None and None not in others:
        better = [name for name in ("Wanda", "SparseGPT") if dass < best[name]]
        yield f"DaSS in its paper's layout is better than {' and '.join(better) or 'neither Wanda nor SparseGPT'}"


def _bytes_table(bench: Bench) -> list[Table]:
    """Zeros alone, a cut alone, and zeros after a cut, at equal stored bytes."""
    row = (bench.args.row or ROWS[-1:])[0]
    rows: list[tuple[str, Sparse]] = []
    alone = {pattern: Sparse(_parse_row(row, pattern, scope)[1], 0) for pattern, scope in EQUAL_BYTES_SCOPES}
    mlp = _parse_row(row, "2:4", "mlp")[1]
    both = Sparse(mlp, 0, EQUAL_BYTES_RATIO)
    calibration = bench.calibration(0)
    settings = bench.structured(RATIO_STEP)
    with bench.stages.stage("statistics for the widths"):
        _, stats = make_plan(
            bench.model, bench.source.name, calibration, settings, dtype=bench.dtype, with_moments=False
        )

    def size_of(made: Sparse) -> int:
        keep: Keep = {}
        if made.ratio:
            asked = bench.structured(made.ratio)
            keep = allocate(bench.model, model_groups(bench.model), stats.scores, asked, stats.influence)
        return stored_bytes(bench.model, keep, made.sparsity)

    def matched(sparsity: Sparsity | None, wanted: int) -> Sparse:
        """The smallest cut that takes no more bytes."""
        ratios = (round(step * RATIO_STEP, 4) for step in range(1, round(0.8 / RATIO_STEP)))
        return next(made for ratio in ratios if size_of(made := Sparse(sparsity, 0, ratio)) <= wanted)

    for pattern, made in alone.items():
        rows.append((f"{pattern} of all Linears, nothing cut", made))
    wanted = size_of(alone["2:4"])
    rows.append(("cut, then 2:4 of the MLPs", matched(mlp, wanted)))
    rows.append(("cut alone", matched(None, wanted)))
    rows.append(("cut by 20 %, then 2:4 of the MLPs", both))
    dense = bench.measure(None)
    cells = []
    for name, made in sorted(rows, key=lambda pair: size_of(pair[1])):
        found = _cells(bench, name, [bench.measure(made)], dense)
        cells.append((found[0], f"{made.ratio:.1%}", size_of(made) / 1e6, *found[1:]))
    first, *others = _columns(bench)
    columns = (first, "cut", "stored, MB", *others)
    note = (
        f"Zeros: {row}; the cut is that of the preset balanced with the allocation {EQUAL_BYTES_ALLOCATION}. Stored: "
        f"{VALUE_BYTES} bytes for each weight that is kept, {PLACE_BITS} bit for each place in a sparse Linear; dense "
        f"{stored_bytes(bench.model, {}, None) / 1e6:.1f} MB."
    )
    return [Table("Zeros and cuts at equal stored bytes", columns, tuple(cells), (), (*_notes(bench), note))]


def stored_bytes(model: PreTrainedModel, keep: Keep, sparsity: Sparsity | None) -> int:
    """Bytes of a model's values without its zeros, once it is cut to `keep`."""
    groups = model_groups(model)
    shapes = linear_shapes(model, groups)
    left = count_parameters(model) - parameters_removed(groups, keep, shapes)
    if sparsity is None:
        return VALUE_BYTES * left
    sides = sparsity.record(groups).sides
    inside = sum(weight_of(linear_of(model, name)).numel() for name in sides)
    if keep:
        assert sparsity.scope == "mlp", "after a cut only MLPs are counted here"
        shares = {group.layer: len(kept(keep, group)) / group.units for group in groups if group.kind == "channels"}
        layer_of = {slot.module: group.layer for group in groups for slot in group.slots}
        inside = sum(round(weight_of(linear_of(model, name)).numel() * shares[layer_of[name]]) for name in sides)
    zeros = Pattern.parse(sparsity.pattern).sparsity
    return round(VALUE_BYTES * (left - zeros * inside) + PLACE_BITS * inside / 8)


def _same_as(sparsity: Sparsity) -> Sparsity:
    """What a method is measured as: in the hardware layout DaSS is Wanda, weight by weight (its file says why)."""
    is_wanda = sparsity.method == "dass" and sparsity.layout == "hardware"
    return replace(sparsity, method="wanda") if is_wanda else sparsity


def _parse_row(text: str, pattern: str, scope: Scope) -> tuple[str, Sparsity]:
    name, equals, spec = text.partition("=")
    parts = spec.split("|")
    if not equals or len(parts) != 3:
        raise EdgepruneError(f"row {text!r} was not understood; expected NAME=METHOD|LAYOUT|REFIT")
    method, layout, refit = parts
    sparsity = Sparsity(pattern, method, scope, cast("Layout", layout), refit)
    sparsity.check()
    return name, sparsity


def _metrics(bench: Bench) -> list[Metric]:
    return [metric for metric in METRICS if metric.task in {task.name for task in bench.tasks}]


def _columns(bench: Bench) -> tuple[str, ...]:
    first, *others = (metric.title for metric in _metrics(bench))
    return ("row", first, "times dense", *others)


def _cells(
    bench: Bench, name: str, found: Sequence[dict[str, float] | None], dense: dict[str, float] | None
) -> tuple[Cell, ...]:
    """Means over the seeds that are there, and the spread in brackets where there are several."""

    def figure(title: str) -> Cell:
        values = [each[title] for each in found if each]
        if len(values) < 2:
            return values[0] if values else None
        return f"{fmean(values):.4g} ({max(values) - min(values):.2g})"

    first, *others = (metric.title for metric in _metrics(bench))
    values = [each[first] for each in found if each]
    times = fmean(values) / dense[first] if values and dense else None
    return (name, figure(first), times, *(figure(title) for title in others))


def _notes(bench: Bench) -> tuple[str, ...]:
    args = bench.args
    windows = "all" if args.windows is None else args.windows
    lambada = "" if args.lambada == 0 else f"; LAMBADA: first {args.lambada or 'all'}"
    dense = bench.measure(None) or {}
    figures = ", ".join(f"{title} {value:.4g}" for title, value in dense.items())
    return (
        f"Dense is {bench.source.description}: {figures}.",
        f"Perplexity: WikiText-2 {args.split}, rows joined by a blank line, {windows} windows of {args.window or 1024} "
        f"tokens{lambada}. Judged in {dtype_name(bench.eval_dtype)}.",
        f"Calibration: {args.calibration_sequences} x {args.calibration_tokens} tokens of {bench.text.name}, seeds "
        f"{', '.join(map(str, args.seeds))}; in brackets: largest minus smallest of the seeds.",
    )


def _arguments() -> Any:
    parser = common.make_parser(__doc__)
    common.add_data_argument(parser)
    parser.add_argument("--model", default=common.MODEL, help="default: %(default)s")
    parser.add_argument("--row", action="append", metavar="NAME=...", help="METHOD|LAYOUT|REFIT; may be given again")
    parser.add_argument("--patterns", nargs="+", default=["2:4"], help="default: 2:4")
    parser.add_argument("--scopes", nargs="+", choices=["mlp", "all"], default=["mlp"], help="default: mlp")
    parser.add_argument("--bytes", action="store_true", help="zeros against cuts at equal stored bytes instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows (default: 0)")
    parser.add_argument("--split", choices=list(common.WIKITEXT2), default="valid", help="default: %(default)s")
    parser.add_argument("--windows", type=limit, default=32, metavar="N", help="or all (default: 32)")
    parser.add_argument("--window", type=int, help="tokens of one (default: 1024)")
    parser.add_argument("--lambada", type=limit, default=0, metavar="N", help="first N passages, or all; default: none")
    parser.add_argument("--calibration-sequences", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--calibration-tokens", type=int, default=512, help="default: %(default)s")
    dtypes = ["auto", "float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the sums (default: %(default)s)")
    parser.add_argument("--eval-dtype", choices=dtypes, default="auto", help="of the judged models (default: auto)")
    parser.add_argument(
        "--results", type=Path, default=common.OUT / "sparsity.jsonl", help="measurements (default: benchmarks/out/...)"
    )
    parser.add_argument("--only-table", action="store_true", help="measure nothing, show what is there")
    args = parser.parse_args()
    args.windows = args.windows or None
    args.documents, args.calibration = None, None
    for name in common.CHOICES:
        setattr(args, name, 0)
    return args


if __name__ == "__main__":
    common.run(main)
