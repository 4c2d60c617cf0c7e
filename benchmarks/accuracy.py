"""What pruning costs in accuracy: perplexity of recipes (method, allocation, refit, heads), all at one ratio.

    python benchmarks/accuracy.py --split test --windows 64              # the README's table
    python benchmarks/accuracy.py --windows 16 --seeds 0 1 2 --recipe "mine=taylor-fine|global:0.6"

Choose recipes on `--split valid` (the default); `test` is read once, for the final table: what was tuned on a text says
little on that text. WikiText-2's rows are joined by a blank line as GPTQ, SparseGPT and Wanda do, then read in windows
that do not overlap. No recipe trains: each is calibrated on C4 (another text than the one it is judged on), cut, and by
default refitted in closed form. The cut torch model is measured itself, in float32; that its ONNX bundle computes the
same is the export's parity gate.

Calibration is random, so is the outcome: with several --seeds the table shows the mean and, as spread, the largest
minus the smallest. Seeds change the calibration windows only, the evaluation text stays. The JSON holds the loss of
every window, so that two recipes can be compared pairwise.

A recipe is NAME=METHOD|ALLOCATION|REFIT|HEADS; what is left empty is the product's default. REFIT is `refit` or
`no-refit`. Recipes that share a method share its statistics, and equal ones are measured once.
"""

import argparse
import copy
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import common
import torch
from evaluation import Outcome, read_evaluation
from transformers import PreTrainedModel

from edgeprune import calibration as calibrating
from edgeprune.cli.stages import Stages
from edgeprune.plan import PrunePlan
from edgeprune.precision import fastest_dtype
from edgeprune.pruning import Settings, allocate, apply_plan, make_plan, model_groups
from edgeprune.sources import Source, load, load_tokenizer, open_source
from edgeprune.statistics import Stats
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Cell, Report, Table

METHODS = (
    "magnitude",
    "wanda-sp",
    "taylor-coarse",
    "taylor-fine",
    "taylor-mixed",
    "fusion:attention",
    "fusion:inverse-variance",
)
DEFAULT_RECIPES = (
    *(f"{method}={method}" for method in METHODS),
    "taylor-fine, no refit=taylor-fine||no-refit",
    *(f"{allocation}=|{allocation}" for allocation in ("uniform", "protect", "global")),
)
REFITS = {"": Settings.refit, "refit": True, "no-refit": False}


def main() -> Report:
    """Measure dense and every recipe for every seed."""
    args = _arguments()
    base = Settings(args.ratio, gradient_sequences=args.gradient_sequences)
    recipes = dict(parse_recipe(text, base) for text in args.recipe or DEFAULT_RECIPES)
    dtype = fastest_dtype() if args.dtype == "auto" else getattr(torch, args.dtype)
    spec = args.calibration or str(common.data_file(args.data, common.CALIBRATION))
    stages = Stages(quiet=False)
    with stages.stage("load the model"):
        source = open_source(args.model)
        model, tokenizer = load(source), load_tokenizer(source)
        text = common.data_file(args.data, common.WIKITEXT2[args.split])
        evaluation = read_evaluation(tokenizer, text, args.windows, args.window, lambada_lines(args))
    with stages.counted("dense") as advance:
        dense = evaluation.measure(model, advance)
    outcomes: dict[Settings, list[Outcome]] = {settings: [] for settings in recipes.values()}
    for seed in args.seeds:
        calibration = calibrating.gather(
            spec,
            tokenizer,
            model,
            sequences=args.calibration_sequences,
            length_tokens=args.calibration_tokens,
            seed=seed,
        )
        by_method = sorted(outcomes, key=lambda settings: settings.method)
        for method, group in itertools.groupby(by_method, key=lambda settings: settings.method):
            sharing = list(group)
            with stages.stage(f"statistics of {method}, seed {seed}"):
                plan, stats = make_plan(model, source.description, calibration, sharing[0], dtype=dtype)
            for settings in sharing:
                with stages.counted(f"{describe(settings)}, seed {seed}") as advance:
                    outcomes[settings].append(evaluation.measure(pruned(model, plan, stats, settings), advance))
    return make_report(args, source, dense, {name: (s, outcomes[s]) for name, s in recipes.items()}, dtype)


def parse_recipe(text: str, base: Settings) -> tuple[str, Settings]:
    """Name and settings of NAME=METHOD|ALLOCATION|REFIT|HEADS.

    Raises:
        EdgepruneError: if it is not of that form, or names what does not exist.
    """
    name, equals, spec = text.partition("=")
    parts = spec.split("|")
    if not equals or not name or len(parts) > 4 or (len(parts) > 2 and parts[2] not in REFITS):
        raise EdgepruneError(
            f"recipe {text!r} was not understood; expected NAME=METHOD|ALLOCATION|REFIT|HEADS with refit or no-refit"
        )
    method, allocation, refit, heads = (*parts, "", "", "")[:4]
    settings = replace(
        base,
        method=method or base.method,
        allocation=allocation or base.allocation,
        refit=REFITS[refit],
        heads=heads or base.heads,  # type: ignore[arg-type]  # check() knows the names
    )
    settings.check()
    return name, settings


def pruned(model: PreTrainedModel, plan: PrunePlan, stats: Stats, settings: Settings) -> PreTrainedModel:
    """A copy of the model, cut by other settings than the plan's from the same statistics."""
    keep = allocate(model, model_groups(model), stats.scores, settings)
    smaller = copy.deepcopy(model)
    apply_plan(smaller, replace(plan, keep=keep, refit="least-squares" if settings.refit else "none"), stats.moments)
    return smaller


def lambada_lines(args: argparse.Namespace) -> list[str]:
    """The first --lambada lines of LAMBADA; none if it was not asked for."""
    if not args.lambada:
        return []
    lines = common.data_file(args.data, common.LAMBADA).read_text("utf-8").split("\n")
    return list(itertools.islice(filter(None, lines), args.lambada))


def make_report(
    args: argparse.Namespace,
    source: Source,
    dense: Outcome,
    measured: Mapping[str, tuple[Settings, list[Outcome]]],
    dtype: torch.dtype,
) -> Report:
    """The table, one row per recipe, means over seeds."""
    columns = ["recipe", "settings", "removed / all", "removed / blocks", "perplexity", "times dense", "spread"]
    rows: list[tuple[Cell, ...]] = [("dense", "", 0.0, 0.0, dense.perplexity, 1.0, None, dense.lambada)]
    for name, (settings, outcomes) in measured.items():
        ratios = [outcome.perplexity / dense.perplexity for outcome in outcomes]
        gone = statistics.fmean(dense.parameters - outcome.parameters for outcome in outcomes)
        accuracies = [outcome.lambada for outcome in outcomes if outcome.lambada is not None]
        rows.append(
            (
                name,
                describe(settings),
                gone / dense.parameters,
                gone / dense.block_parameters,
                statistics.fmean(outcome.perplexity for outcome in outcomes),
                statistics.fmean(ratios),
                max(ratios) - min(ratios) if len(ratios) > 1 else None,
                statistics.fmean(accuracies) if accuracies else None,
            )
        )
    if args.lambada:
        columns.append(f"LAMBADA accuracy of {args.lambada}")
    else:
        rows = [row[:-1] for row in rows]
    calibration = args.calibration or "C4"
    notes = (
        f"Dense is {source.description}.",
        f"WikiText-2 {args.split}, rows joined by a blank line, {len(dense.window_nll)} windows of {args.window} "
        f"tokens; calibration {args.calibration_sequences} x {args.calibration_tokens} tokens of {calibration}, "
        f"gradients on {args.gradient_sequences} sequences, statistics in {str(dtype).removeprefix('torch.')}, "
        f"seeds {', '.join(map(str, args.seeds))}; spread: largest minus smallest times dense.",
    )
    data = {
        "dense": asdict(dense),
        "recipes": {
            name: {"settings": asdict(settings), "seeds": dict(zip(args.seeds, map(asdict, outcomes), strict=True))}
            for name, (settings, outcomes) in measured.items()
        },
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }
    table = Table(
        f"Perplexity after {args.ratio:.0%} of all parameters are gone", tuple(columns), tuple(rows), (), notes
    )
    return Report(f"Accuracy of {Path(source.name).name} by recipe", this_machine(), (table,), data=data)


def describe(settings: Settings) -> str:
    """The settings that a recipe chooses, in words."""
    refit = "refit" if settings.refit else "no refit"
    return f"{settings.method}, {settings.allocation}, {refit}, heads {settings.heads}"


def _arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    common.add_data_argument(parser)
    parser.add_argument("--model", default=common.MODEL, help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters removed (default: 0.2)")
    parser.add_argument("--recipe", action="append", metavar="NAME=...", help="may be given again; default: a list")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows (default: 0)")
    parser.add_argument("--split", choices=list(common.WIKITEXT2), default="valid", help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=64, help="perplexity windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--lambada", type=int, default=0, metavar="N", help="accuracy on N passages as well")
    parser.add_argument("--calibration", help="another text than C4, as `edgeprune compress` takes it")
    parser.add_argument("--calibration-sequences", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--calibration-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument(
        "--gradient-sequences", type=int, default=Settings.gradient_sequences, help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the statistics")
    return parser.parse_args()


if __name__ == "__main__":
    common.run(main)
