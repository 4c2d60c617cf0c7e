r"""What pruning costs in accuracy: perplexity, LAMBADA and multiple choice of the published recipes and of ours.

    python benchmarks/accuracy.py                                        # a quick look: 20 %, one seed, 64 windows
    python benchmarks/accuracy.py --recipe "mine=obs|influence" --windows 16 --seeds 0 1 2

    python benchmarks/accuracy.py --split test --ratios 0.1 0.2 0.3 0.5 --seeds 0 1 2 \
        --windows all --lambada all --arc-easy all --piqa all            # the README's table, hours
    ... --only-table                                                     # what is there of it, and what is missing

    python benchmarks/accuracy.py --model stories260K --documents tinystories.jsonl --calibration-sequences 64 \
        --calibration-tokens 256                                         # another model on its own text

Rows are the dense model and the recipes of recipes.py, or those given with --recipe. All remove the same share of all
parameters and see the same calibration tokens: each is calibrated on C4 (another text than those it is judged on), cut,
and refitted as it says. None is trained on a loss but the one that says "recover lora", which no verdict counts. Choose
recipes on `--split valid` (the default); `test` is read once, for the final table: what was tuned on a text says little
on that text.

WikiText-2's rows are joined by a blank line as GPTQ, SparseGPT and Wanda do, then read in windows that do not overlap.
With --documents, perplexity is that of documents, each from the begin-of-text token and cut at --window tokens; unless
--calibration names another text, every other document is calibrated on and the rest is judged. LAMBADA, ARC-easy, PIQA
and HellaSwag are those of lm-evaluation-harness, zero-shot. The cut torch model is measured itself; that its ONNX
bundle computes the same is the export's parity gate.

Calibration is random, so is the outcome: with several --seeds a cell holds the mean and, in brackets, the spread, which
is the largest minus the smallest. Seeds change the calibration windows only, the texts stay.

Every finished measurement (model, ratio, recipe, seed, task) is appended to --results at once, and never repeated: stop
the script when you like, start it again, split the table over several runs or machines and join their files.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from evaluation import (
    Choices,
    Documents,
    Lambada,
    Result,
    Task,
    Windows,
    accuracy,
    documents,
    in_dtype,
    perplexity,
    score,
    sha256,
)
from recipes import Recipe, describe, named, parse_recipe
from results import Record, Results, code_hash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeprune import calibration as calibrating
from edgeprune.cli.extras import need
from edgeprune.cli.stages import Stages
from edgeprune.journal import Journal
from edgeprune.plan import PrunePlan
from edgeprune.precision import fastest_dtype
from edgeprune.pruning import (
    RATIO_TOLERANCE,
    Settings,
    allocate,
    apply_plan,
    check_ratio,
    judge,
    make_plan,
    model_groups,
)
from edgeprune.recover import ask_teacher, recover
from edgeprune.sources import Source, count_parameters, load, load_tokenizer, open_source
from edgeprune.statistics import Progress, Stats
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Cell, Report, Table, Verdict

WINDOW_TOKENS, DOCUMENT_TOKENS = 1024, 512
Key = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A column: its title, the task it shows, and which flags of the task's result it counts (None: perplexity)."""

    title: str
    task: str
    flags: str | None = None

    def value(self, result: Result) -> float:
        """The figure of one model."""
        return perplexity(result) if self.flags is None else accuracy(result[self.flags])


METRICS = (
    Metric("perplexity", "perplexity"),
    Metric("LAMBADA", "lambada", "acc"),
    Metric("ARC-easy", "arc_easy", "acc"),
    Metric("ARC-easy norm", "arc_easy", "acc_norm"),
    Metric("PIQA", "piqa", "acc"),
    Metric("PIQA norm", "piqa", "acc_norm"),
    Metric("HellaSwag", "hellaswag", "acc"),
    Metric("HellaSwag norm", "hellaswag", "acc_norm"),
)


@dataclass(frozen=True)
class Cut:
    """A pruned model to be measured; settings that two recipes share are measured once."""

    settings: Settings
    seed: int


@dataclass(frozen=True)
class Experiment:
    """What the table asks for, and how its measurements are called."""

    args: argparse.Namespace
    source: Source
    recipes: Sequence[Recipe]
    tasks: Sequence[Task]
    calibration: str
    dtype: torch.dtype
    eval_dtype: torch.dtype

    def key(self, task: Task, cut: Cut | None) -> Key:
        """Everything that determines a measurement; no cut is the dense model."""
        key: Key = {"model": model_key(self.source), "eval_dtype": dtype_name(self.eval_dtype), **task.key()}
        if cut is not None:
            path = Path(self.calibration)
            key |= {
                "settings": _settings_key(cut.settings),
                "calibration": {
                    "text": sha256(path) if path.is_file() else self.calibration,
                    "sequences": self.args.calibration_sequences,
                    "tokens": self.args.calibration_tokens,
                    "seed": cut.seed,
                },
                "dtype": dtype_name(self.dtype),
            }
        return key

    def cuts(self) -> list[Cut]:
        """All pruned models of the table, each once."""
        args = self.args
        cuts = (Cut(recipe.at(ratio), seed) for ratio in args.ratios for seed in args.seeds for recipe in self.recipes)
        return list(dict.fromkeys(cuts))

    def missing(self, results: Results, cut: Cut | None) -> list[Task]:
        """The tasks on which a model was not measured yet."""
        return [task for task in self.tasks if results.find(self.key(task, cut)) is None]


def main() -> Report:
    """Measure what is missing, and make the table of what there is."""
    args = _arguments()
    gradient_sequences = args.gradient_sequences or args.calibration_sequences
    base = Settings(args.ratios[0], align=args.align, gradient_sequences=gradient_sequences)
    recipes = [parse_recipe(text, base) for text in args.recipe] if args.recipe else named(base)
    if any(recipe.settings.recover_passes for recipe in recipes) and not args.only_table:
        need("recover", "peft")
    for ratio in args.ratios:
        check_ratio(ratio)
    results = Results(args.results, code_hash() if args.same_code else None)
    with _calibration_text(args) as calibration:
        experiment = Experiment(
            args,
            open_source(args.model),
            recipes,
            tasks(args),
            calibration,
            dtype_of(args.dtype),
            dtype_of(args.eval_dtype),
        )
        failures = {} if args.only_table else measure(experiment, results)
        return make_report(experiment, results, failures)


def tasks(args: argparse.Namespace) -> list[Task]:
    """What every model is measured on.

    Raises:
        EdgepruneError: if a text is missing.
    """
    if args.documents:
        halves = args.calibration is None
        window = args.window or DOCUMENT_TOKENS
        found: list[Task] = [Documents(_file(args.documents), window, args.windows, every_other=halves)]
    else:
        text = common.data_file(args.data, common.WIKITEXT2[args.split])
        found = [Windows(text, args.window or WINDOW_TOKENS, args.windows)]
    if args.lambada != 0:
        found.append(Lambada(common.data_file(args.data, common.LAMBADA), args.lambada))
    for name, file in common.CHOICES.items():
        if getattr(args, name) != 0:
            found.append(Choices(name, common.data_file(args.data, file), getattr(args, name)))
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(experiment: Experiment, results: Results) -> dict[Cut, str]:
    """Measure everything that is missing; of the cuts that cannot be made, the reason.

    Cuts that share a seed and a method share its statistics, which is where most of the time before a cut goes; those
    that differ by their recovery alone share the cut.
    """
    left = [cut for cut in experiment.cuts() if experiment.missing(results, cut)]
    dense_tasks = experiment.missing(results, None)
    if not left and not dense_tasks:
        return {}
    failures: dict[Cut, str] = {}
    stages = Stages(quiet=False)
    with stages.stage("load the model"):
        model, tokenizer = load(experiment.source), load_tokenizer(experiment.source)
    if dense_tasks:
        _measure_one(experiment, results, stages, model, tokenizer, None)
    left.sort(key=lambda cut: (cut.seed, cut.settings.method))
    for (seed, method), group in itertools.groupby(left, key=lambda cut: (cut.seed, cut.settings.method)):
        sharing = list(group)
        with stages.phased(f"statistics of {method}, seed {seed}") as told:
            made, stats, calibration = _statistics(experiment, model, tokenizer, sharing, told)
        alike: dict[Settings, list[Cut]] = {}
        for cut in sharing:
            alike.setdefault(replace(cut.settings, recover="none"), []).append(cut)
        for settings, cuts in alike.items():
            try:
                with stages.phased(f"cut of {_title(cuts[0])}") as told:
                    smaller = pruned(model, made, stats, settings, calibration, experiment.dtype, told)
            except EdgepruneError as error:
                failures |= dict.fromkeys(cuts, str(error))
                stages.remark(f"{_title(cuts[0])}: {error}")
                continue
            for cut in cuts:
                judged = smaller
                if passes := cut.settings.recover_passes:
                    with stages.stage(f"recovery of {_title(cut)}"):
                        judged = recovered(model, smaller, passes, calibration, experiment.dtype)
                _measure_one(experiment, results, stages, judged, tokenizer, cut)
            del smaller, judged  # before the next one is made
    return failures


def pruned(
    model: PreTrainedModel,
    plan: PrunePlan,
    stats: Stats,
    settings: Settings,
    calibration: calibrating.Calibration,
    dtype: torch.dtype,
    progress: Progress = lambda stage, done, total: None,
) -> PreTrainedModel:
    """A copy of the model, cut by other settings than the plan's from the same statistics.

    Raises:
        EdgepruneError: if the ratio cannot be reached so.
    """
    judge_of = partial(
        judge, model, calibration=calibration, settings=settings, stats=stats, dtype=dtype, progress=progress
    )
    keep = allocate(model, model_groups(model), stats.scores, settings, stats.influence, judge_of)
    smaller = copy.deepcopy(model)
    wanted = replace(plan, keep=keep, refit=settings.refit)
    apply_plan(smaller, wanted, stats.moments, calibration, dtype=dtype, progress=progress)
    return smaller


def recovered(
    model: PreTrainedModel,
    smaller: PreTrainedModel,
    passes: int,
    calibration: calibrating.Calibration,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """A copy of a cut model, trained through adapters to say what the dense model says."""
    journal, trained = Journal(), copy.deepcopy(smaller)
    ask_teacher(model, calibration, journal, dtype=dtype)
    recover(trained, passes, calibration, journal, dtype=dtype)
    return trained


def _statistics(
    experiment: Experiment,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sharing: Sequence[Cut],
    progress: Progress,
) -> tuple[PrunePlan, Stats, calibrating.Calibration]:
    calibration = calibrating.gather(
        experiment.calibration,
        tokenizer,
        model,
        sequences=experiment.args.calibration_sequences,
        length_tokens=experiment.args.calibration_tokens,
        seed=sharing[0].seed,
    )
    # The statistics must serve all: their plan is one that can be made whatever the ratios are; nobody carries it out.
    ratio = min(cut.settings.ratio for cut in sharing)
    settings = replace(sharing[0].settings, ratio=ratio, allocation="uniform:mixed", heads="auto")
    refits = any(cut.settings.refit != "none" or cut.settings.reads_moments for cut in sharing)
    plan, stats = make_plan(
        model,
        experiment.source.description,
        calibration,
        settings,
        dtype=experiment.dtype,
        with_moments=refits,
        progress=progress,
    )
    return plan, stats, calibration


def _measure_one(
    experiment: Experiment,
    results: Results,
    stages: Stages,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut | None,
) -> None:
    left = [(task, experiment.key(task, cut)) for task in experiment.missing(results, cut)]
    measure_model(model, tokenizer, left, experiment.eval_dtype, results, stages, _title(cut))


def measure_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[tuple[Task, Key]],
    eval_dtype: torch.dtype,
    results: Results,
    stages: Stages,
    title: str,
) -> None:
    """Judge a model on tasks, and add what came out under their keys."""
    in_blocks = sum(parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name)
    sizes = {"parameters": count_parameters(model), "block_parameters": in_blocks}
    judged = in_dtype(model, eval_dtype)
    for task, key in tasks:
        with stages.counted(f"{task.name} of {title}") as advance:
            began = time.perf_counter()
            questions = task.questions(tokenizer)
            result = task.judge(questions, score(judged, questions, advance, greedy=task.greedy))
            seconds = time.perf_counter() - began
        machine = this_machine()
        made = {"cpu": machine.cpu, "torch": torch.__version__, "threads": torch.get_num_threads(), "code": code_hash()}
        results.add(key, {**sizes, "result": result, "seconds": round(seconds, 1), **made})


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row as measured so far: each metric's value for each seed that is there."""

    name: str
    settings: Settings | None
    values: Mapping[str, Mapping[int, float]]
    records: Sequence[Record]

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds; None if there is none yet."""
        values = self.values[metric].values()
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Largest minus smallest over the seeds; None with fewer than two."""
        values = self.values[metric].values()
        return max(values) - min(values) if len(values) > 1 else None


def make_report(experiment: Experiment, results: Results, failures: Mapping[Cut, str]) -> Report:
    """One table per ratio, with what can be said of it, and what is missing."""
    args = experiment.args
    dense = _row(experiment, results, "dense", None)
    tables: list[Table] = []
    verdicts: list[Verdict] = []
    data: dict[str, Any] = {}
    codes = {record["code"] for record in dense.records}
    for ratio in args.ratios:
        rows = {recipe: _row(experiment, results, recipe.name, recipe.at(ratio)) for recipe in experiment.recipes}
        codes |= {record["code"] for row in rows.values() for record in row.records}
        tables.append(_table(experiment, ratio, dense, rows))
        verdicts += _verdicts(ratio, dense, rows)
        data[f"{ratio:g}"] = {
            recipe.name: {"kind": recipe.kind, "settings": asdict(recipe.at(ratio)), "values": row.values}
            for recipe, row in rows.items()
        }
    missing = [
        {"model": _title(cut), "task": task.name}
        for cut in (None, *experiment.cuts())
        for task in experiment.missing(results, cut)
    ]
    if missing:
        wanted = (1 + len(experiment.cuts())) * len(experiment.tasks)
        text = f"{len(missing)} of {wanted} measurements are missing"
        verdicts.insert(0, Verdict(text if failures else f"{text}; the same command makes them", passed=False))
    verdicts += [Verdict(f"{_title(cut)}: {reason}", passed=False) for cut, reason in failures.items()]
    if len(codes) > 1:
        text = f"measured by {len(codes)} states of the source; --same-code counts only those of this one"
        verdicts.append(Verdict(text))
    name = Path(experiment.source.name).name
    return Report(
        f"Accuracy of {name} by recipe",
        this_machine(),
        tuple(tables),
        tuple(verdicts),
        {
            "dense": dense.values,
            "ratios": data,
            "missing": missing,
            "arguments": json.loads(json.dumps(vars(args), default=str)),
        },
    )


def _row(experiment: Experiment, results: Results, name: str, settings: Settings | None) -> Row:
    found = {
        (task.name, seed): record
        for task in experiment.tasks
        for seed in (experiment.args.seeds if settings else [0])
        if (record := results.find(experiment.key(task, Cut(settings, seed) if settings else None)))
    }
    values = {
        metric.title: {
            seed: metric.value(record["result"]) for (task, seed), record in found.items() if task == metric.task
        }
        for metric in _metrics(experiment)
    }
    return Row(name, settings, values, list(found.values()))


def _metrics(experiment: Experiment) -> list[Metric]:
    asked = {task.name for task in experiment.tasks}
    return [metric for metric in METRICS if metric.task in asked]


def _table(experiment: Experiment, ratio: float, dense: Row, rows: Mapping[Recipe, Row]) -> Table:
    metrics = [metric.title for metric in _metrics(experiment)]
    first, *others = metrics
    columns = ("recipe", "settings", "removed / all", "removed / blocks", first, "times dense", *others)
    cells = [_cells(row, dense, metrics) for row in (dense, *rows.values())]
    return Table(f"{ratio:.0%} of all parameters removed", columns, tuple(cells), (), _notes(experiment))


def _cells(row: Row, dense: Row, metrics: Sequence[str]) -> tuple[Cell, ...]:
    removed = [_removed(row, dense, what) for what in ("parameters", "block_parameters")]
    mean, dense_mean = row.mean("perplexity"), dense.mean("perplexity")
    times = mean / dense_mean if mean is not None and dense_mean is not None else None
    figures: list[Cell] = [_figure(row, metric) for metric in metrics]
    settings = describe(row.settings) if row.settings else ""
    return (row.name, settings, *removed, figures[0], times, *figures[1:])


def _figure(row: Row, metric: str) -> Cell:
    """Mean, and the spread behind it where there are several seeds."""
    mean, spread = row.mean(metric), row.spread(metric)
    return mean if mean is None or spread is None else f"{mean:.4g} ({spread:.2g})"


def _removed(row: Row, dense: Row, what: str) -> float | None:
    """Share of the dense model's parameters that is gone, the mean over the seeds."""
    if not row.records or not dense.records:
        return None
    before: int = dense.records[0][what]
    return 1.0 - statistics.fmean(record[what] for record in row.records) / before


def _notes(experiment: Experiment) -> tuple[str, ...]:
    args = experiment.args
    perplexity_text, *others = experiment.tasks
    if isinstance(perplexity_text, Windows):
        number = "all" if args.windows is None else args.windows
        text = (
            f"Perplexity: WikiText-2 {args.split}, rows joined by a blank line, {number} windows of "
            f"{perplexity_text.window} tokens."
        )
    else:
        assert isinstance(perplexity_text, Documents)
        share = "every other document" if perplexity_text.every_other else "documents"
        text = (
            f"Perplexity: {share} of {perplexity_text.path.name}, each from the begin-of-text token and cut at "
            f"{perplexity_text.window} tokens."
        )
    limits = (f"{task.name} {'all' if task.key()['limit'] is None else task.key()['limit']}" for task in others)
    judged = f" Accuracies: zero-shot as lm-evaluation-harness defines them ({', '.join(limits)})." if others else ""
    calibration = (
        Path(experiment.calibration).name if Path(experiment.calibration).is_file() else experiment.calibration
    )
    spread = " In brackets: largest minus smallest of the seeds." if len(args.seeds) > 1 else ""
    return (
        f"Dense is {experiment.source.description}.",
        f"{text}{judged} Models judged in {dtype_name(experiment.eval_dtype)}, losses in float32.",
        f"Calibration: {args.calibration_sequences} x {args.calibration_tokens} tokens of {calibration}, statistics in "
        f"{dtype_name(experiment.dtype)}; seeds {', '.join(map(str, args.seeds))}.{spread}",
    )


def _verdicts(ratio: float, dense: Row, rows: Mapping[Recipe, Row]) -> Iterator[Verdict]:
    """What a table is made to answer: are all rows equal in size, is ours better than the others, does fusing help."""
    shares = [share for row in rows.values() if (share := _removed(row, dense, "parameters")) is not None]
    if shares:
        off = max(abs(share - ratio) for share in shares)
        yield Verdict(
            f"{ratio:.0%}: rows remove {min(shares):.2%} to {max(shares):.2%} of all parameters", off <= RATIO_TOLERANCE
        )
    others = [row for recipe, row in rows.items() if recipe.kind == "other"]
    ours = [row for recipe, row in rows.items() if recipe.kind == "ours"]
    best, rival = _best(ours, "perplexity", lower=True), _best(others, "perplexity", lower=True)
    dense_mean = dense.mean("perplexity")
    if best and rival and dense_mean is not None:
        yield Verdict(
            f"{ratio:.0%}: {best[0].name} has {best[1] / dense_mean:.2f} times the dense perplexity, "
            f"{abs(1 - best[1] / rival[1]):.0%} {'below' if best[1] < rival[1] else 'above'} the best other row "
            f"({rival[0].name})"
        )
    for metric in list(dense.values)[1:]:
        best, rival = _best(ours, metric, lower=False), _best(others, metric, lower=False)
        if best and rival:
            spread = max(best[0].spread(metric) or 0.0, rival[0].spread(metric) or 0.0)
            yield Verdict(
                f"{ratio:.0%}: {metric} of {best[0].name} {best[1]:.1%}, of the best other row ({rival[0].name}) "
                f"{rival[1]:.1%}; the larger spread is {spread:.1%}"
            )
    trio = {recipe.name: row for recipe, row in rows.items() if recipe.kind == "fusion"}
    yield from _fusion_verdict(ratio, list(trio.values()))


def _fusion_verdict(ratio: float, trio: Sequence[Row]) -> Iterator[Verdict]:
    """Fused against coarse and fine alone, seed by seed; the rows stand in that order."""
    if len(trio) != 3:
        return
    coarse, fine, fused = (row.values["perplexity"] for row in trio)
    seeds = sorted(set(coarse) & set(fine) & set(fused))
    if seeds:
        factors = [fused[seed] / min(coarse[seed], fine[seed]) for seed in seeds]
        wins = sum(factor < 1 for factor in factors)
        yield Verdict(
            f"{ratio:.0%}: fused scores give {statistics.fmean(factors):.3f} times the perplexity of the better of "
            f"coarse and fine alone, and are better for {wins} of {len(seeds)} seeds"
        )


def _best(rows: Sequence[Row], metric: str, *, lower: bool) -> tuple[Row, float] | None:
    """The row with the best mean, and that mean."""
    found = [(row, mean) for row in rows if (mean := row.mean(metric)) is not None]
    return min(found, key=lambda pair: pair[1] if lower else -pair[1], default=None)


# --- what was asked for -----------------------------------------------------------------------------------------------


@contextmanager
def _calibration_text(args: argparse.Namespace) -> Iterator[str]:
    """The calibration text as `calibration.gather` takes it: the user's, or half of the documents, or C4."""
    if args.calibration is not None:
        yield args.calibration
    elif args.documents is None:
        yield str(common.data_file(args.data, common.CALIBRATION))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{args.documents.stem}-other-half.jsonl"
            texts = documents(_file(args.documents))[::2]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
            yield str(path)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise EdgepruneError(f'--documents {path} is no file; expected one of {{"text"}} lines')
    return path


def model_key(source: Source) -> Key:
    """Which weights: of local files by their hash, of the hub by revision."""
    if source.kind == "hub":
        return {"hub": source.name, "revision": source.revision}
    files = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    files += [file for file in (source.path / "config.json",) if file.is_file()]
    return {"name": Path(source.name).name, "files": [sha256(file) for file in files]}


def _settings_key(settings: Settings) -> Key:
    """All settings; but measurements that are older than recovery do not name it."""
    return {name: value for name, value in asdict(settings).items() if (name, value) != ("recover", "none")}


def _title(cut: Cut | None) -> str:
    return f"{describe(cut.settings)} at {cut.settings.ratio:.0%}, seed {cut.seed}" if cut else "dense"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = fastest_dtype() if name == "auto" else getattr(torch, name)
    return dtype


def limit(text: str) -> int | None:
    """A number of passages; None for `all`."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    common.add_data_argument(parser)
    parser.add_argument("--model", default=common.MODEL, help="default: %(default)s")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.2], help="shares of all parameters (default: 0.2)"
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME=...",
        help="METHOD|ALLOCATION|REFIT|HEADS|RECOVER; may be given again (default: all of recipes.py)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows (default: 0)")
    parser.add_argument("--split", choices=list(common.WIKITEXT2), default="valid", help="default: %(default)s")
    parser.add_argument(
        "--documents", type=Path, help='perplexity of this file\'s {"text"} lines instead of WikiText-2'
    )
    parser.add_argument(
        "--windows",
        type=limit,
        default=64,
        metavar="N",
        help="windows or documents; all or 0: the whole (default: 64)",
    )
    parser.add_argument(
        "--window", type=int, help=f"tokens of one (default: {WINDOW_TOKENS}, of a document {DOCUMENT_TOKENS})"
    )
    for name in ("lambada", *common.CHOICES):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=limit, default=0, metavar="N", help="first N items, or all (default: none)")
    parser.add_argument("--calibration", help="another text than C4, as `edgeprune compress` takes it")
    parser.add_argument("--calibration-sequences", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--calibration-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--gradient-sequences", type=int, help="default: all calibration sequences")
    parser.add_argument(
        "--align", type=int, default=Settings.align, help="kept channels are multiples of it (default: %(default)s)"
    )
    dtypes = ["auto", "float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the statistics (default: %(default)s)")
    parser.add_argument(
        "--eval-dtype", choices=dtypes, default="auto", help="of the judged models (default: auto, the fastest here)"
    )
    parser.add_argument(
        "--results", type=Path, default=common.OUT / "accuracy.jsonl", help="measurements (default: benchmarks/out/...)"
    )
    parser.add_argument("--same-code", action="store_true", help="count only measurements of the source as it is now")
    parser.add_argument("--only-table", action="store_true", help="measure nothing, show what is there")
    args = parser.parse_args()
    args.windows = args.windows or None
    if args.window is not None and args.window < 2:
        raise EdgepruneError(f"--window is {args.window}; at least 2 tokens were expected")
    return args


if __name__ == "__main__":
    common.run(main)
