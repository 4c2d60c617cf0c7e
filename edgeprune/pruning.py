"""From a model and calibration tokens to a plan, and from a plan to a smaller model.

The order of the papers: group, estimate, allocate (`make_plan`), then refit and cut (`apply_plan`). Both walk the model
block by block and leave what they finish in a journal: the steps of `statistics`, then

    scores-METHOD-L  scores of block L by another method than was asked for, which `judged` compares
    search-N         the answer to the Nth question about widths, of `judged` or of a search
    plan             the plan
    cut-L            the tensors of block L, refitted and cut; the moments of its inputs are dropped from the disk then
    path-L           with the refit "reconstruct": that a block before the first cut was run, nothing else

Around them come those of `recover`, if the cut model is trained, and after these those of `sparsify`, if it gets zeros.
"""

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import ModuleType
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from edgeprune import plugins
from edgeprune.budget import Heads, Judge, Layer, Problem, any_counts
from edgeprune.calibration import Calibration
from edgeprune.candidates import STEP as SEARCH_STEP
from edgeprune.candidates import Candidates
from edgeprune.distributed import Ranks
from edgeprune.groups import Group, Keep, Kind, check_keep, kept, layer_widths
from edgeprune.journal import Entry, Journal
from edgeprune.plan import PrunePlan
from edgeprune.reconstruct import Paths, altered, mlp_names
from edgeprune.recover import ADAPTERS, RECOVER, TEACHER, parse_recover
from edgeprune.recover import check_sequences as check_recovered_on
from edgeprune.refit import (
    Mode,
    Outcome,
    carry_intercepts,
    check_intercepts,
    parse_refit,
    refit_linear,
    shapes_with_intercepts,
)
from edgeprune.shrink import (
    LinearShape,
    linear_of,
    linear_shapes,
    parameters_removed,
    set_widths,
    shrink_blocks,
    unit_parameters,
)
from edgeprune.sources import count_parameters
from edgeprune.statistics import (
    BATCH_TOKENS,
    HELD_OUT_EVERY,
    Method,
    Moments,
    Progress,
    Stats,
    gather,
    held_out,
    moments_entry,
)
from edgeprune.stock import check_alike, check_stock_widths, stock_counts
from edgeprune.streaming import Decoder
from edgeprune.streaming import model_groups as model_groups
from edgeprune_runtime import __version__
from edgeprune_runtime.errors import EdgepruneError

LARGEST_RATIO = 0.9
RATIO_TOLERANCE = 0.005
"""Contract: the ratio is reached within this share of all parameters, unless alignment forbids."""

Widths = Literal["per-layer", "uniform"]
UNIFORM_ALLOCATION = "uniform"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to prune.

    Attributes:
        ratio: share of all parameters (tied ones once) to remove, above 0 to 0.9.
        method: importance method, `name` or `name:argument`.
        allocation: `name` or `name:argument`.
        refit: how o_proj and down_proj learn to do without what goes: "least-squares" fits their kept weights,
            "reconstruct" (or "reconstruct:PASSES") these and then the whole MLP, "intercept" them and a bias, "bias"
            the bias alone, "none" nothing.
        align: kept channel counts are multiples of it.
        min_channels: no MLP keeps fewer channels.
        gradient_sequences: how many calibration sequences the loss gradients see.
        heads: how heads compete with channels: "auto" by lost score, "even" by giving the same share (the papers' way),
            "keep" not at all.
        widths: "per-layer", or "uniform": every layer keeps the same counts, such as stock code builds from a config.
        recover: "none", or "lora" (or "lora:PASSES"): adapters of the cut model are trained afterwards.
    """

    ratio: float
    method: str = "wanda-sp"
    allocation: str = "protect"
    refit: str = "least-squares"
    align: int = 32
    min_channels: int = 64
    gradient_sequences: int = 32
    heads: Heads = "auto"
    widths: Widths = "per-layer"
    recover: str = "none"

    def check(self) -> None:
        """Check everything that needs no model.

        Raises:
            EdgepruneError: naming the value that is wrong.
        """
        check_ratio(self.ratio)
        if self.align < 1 or self.min_channels < 1 or self.gradient_sequences < 1:
            raise EdgepruneError(
                f"align {self.align}, min-channels {self.min_channels} and gradient-sequences "
                f"{self.gradient_sequences} "
                "must all be at least 1"
            )
        parse_refit(self.refit)
        parse_recover(self.recover)
        if self.heads not in get_args(Heads):
            raise EdgepruneError(f"unknown --heads {self.heads!r}; expected {', '.join(get_args(Heads))}")
        if Method.parse(self.method).sampled and self.gradient_sequences < 2:
            raise EdgepruneError(
                f"method {self.method} compares calibration samples; expected --gradient-sequences >= 2"
            )
        self._allocation.check(self.allocation.partition(":")[2] or None, self.heads)
        if self.widths not in get_args(Widths):
            raise EdgepruneError(f"unknown --widths {self.widths!r}; expected {', '.join(get_args(Widths))}")
        if self.is_uniform and self.allocation != UNIFORM_ALLOCATION:
            raise EdgepruneError(
                f"--widths uniform gives every layer the same counts, --allocation {self.allocation} does not; "
                f"expected --allocation {UNIFORM_ALLOCATION}, or --widths per-layer"
            )

    def check_for(self, model_type: str) -> None:
        """Check what the architecture alone decides.

        Raises:
            EdgepruneError: if its checkpoints cannot carry what the refit would add, or stock code the widths.
        """
        check_intercepts(model_type, self.mode, self.cut_kinds)
        if self.is_uniform:
            check_stock_widths(model_type)

    def check_sequences(self, sequences: int) -> None:
        """Check that allocation, refit and recovery can do with so many calibration sequences.

        Raises:
            EdgepruneError: if they cannot.
        """
        if self.recover_passes:
            check_recovered_on(sequences)
        is_refit_blind = self.mode == "reconstruct" and sequences < HELD_OUT_EVERY
        least = 2 * HELD_OUT_EVERY if self.holds_models else HELD_OUT_EVERY  # a search proposes and accepts on others
        if self.reads_moments and sequences < least:
            raise EdgepruneError(
                f"allocation {self.allocation} compares cuts on one of {HELD_OUT_EVERY} calibration sequences, kept "
                f"aside, and {sequences} leave too few; raise --calibration-sequences to {least} or more, or use "
                f"--allocation protect{' --refit least-squares' if is_refit_blind else ''}"
            )
        if is_refit_blind:
            raise EdgepruneError(
                f"refit reconstruct judges itself on one of {HELD_OUT_EVERY} calibration sequences, kept aside, and "
                f"{sequences} leave none; raise --calibration-sequences to {HELD_OUT_EVERY} or more, or use --refit "
                "least-squares"
            )

    @property
    def mode(self) -> Mode:
        """The mode of the refit."""
        return parse_refit(self.refit)[0]

    @property
    def recover_passes(self) -> int:
        """Passes of the recovery; 0 without one."""
        return parse_recover(self.recover)

    @property
    def is_uniform(self) -> bool:
        """Whether the result must have a stock config."""
        return self.widths == "uniform"

    @property
    def cut_kinds(self) -> frozenset[Kind]:
        """Kinds of groups that may be narrowed."""
        return frozenset({"channels"} if self.heads == "keep" else get_args(Kind))

    @property
    def _allocation(self) -> ModuleType:
        return plugins.find("allocation", self.allocation.partition(":")[0], "allocation")

    @property
    def reads_moments(self) -> bool:
        """Whether the allocation judges refitted candidates, and so reads what a refit reads."""
        return bool(getattr(self._allocation, "NEEDS_JUDGE", False))

    @property
    def compares_scores(self) -> bool:
        """Whether the allocation compares scores of other methods with those of `method`."""
        methods = getattr(self._allocation, "methods", None)
        return methods is not None and bool(methods(self.allocation.partition(":")[2] or None))

    @property
    def holds_models(self) -> bool:
        """Whether the allocation holds whole candidates in memory."""
        return bool(getattr(self._allocation, "HOLDS_MODELS", False))

    @property
    def gathers_moments(self) -> bool:
        """Whether importance or allocation read the moments of inputs, refit or not."""
        return self.reads_moments or "inputs" in Method.parse(self.method).needs


def check_ratio(ratio: float) -> None:
    """Check a share of parameters to remove.

    Raises:
        EdgepruneError: if it is not above 0 and at most 0.9.
    """
    if not 0.0 < ratio <= LARGEST_RATIO:
        raise EdgepruneError(
            f"ratio {ratio:g} is out of range; expected the share of all parameters to remove, "
            f"above 0 and at most {LARGEST_RATIO:g}"
        )


def make_plan(
    model: PreTrainedModel | Decoder,
    name: str,
    calibration: Calibration,
    settings: Settings,
    *,
    dtype: torch.dtype = torch.float32,
    with_moments: bool | None = None,
    step_tokens: int = BATCH_TOKENS,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[PrunePlan, Stats]:
    """Estimate what every unit is worth, and decide what stays. The model is not changed.

    Args:
        model: the dense model.
        name: what the plan calls it.
        calibration: the tokens that the statistics see.
        settings: how to prune.
        dtype: of the statistics' matrix products.
        with_moments: keep what the refit will read; by default if the settings ask for a refit. An allocation that
            reads the same gets it in any case.
        step_tokens: tokens that go through a block at once.
        journal: remembers every finished step; in memory by default.
        ranks: the processes that share the sequences. The first one makes the plan, for which the others wait.
        progress: told of every block.

    Raises:
        EdgepruneError: if the settings are wrong or the ratio cannot be reached.
    """
    settings.check()
    settings.check_sequences(len(calibration.ids))
    decoder, journal = Decoder.of(model), Journal() if journal is None else journal
    ranks = Ranks() if ranks is None else ranks
    settings.check_for(decoder.config.model_type)
    if settings.is_uniform:
        check_alike(decoder.groups)
    if settings.mode == "reconstruct":
        mlp_names(decoder.config, [group for group in decoder.groups if group.layer == 0])
    if with_moments is None:
        with_moments = settings.refit != "none"
    stats = gather(
        decoder,
        decoder.groups,
        calibration.ids,
        Method.parse(settings.method),
        with_moments=with_moments or settings.reads_moments,
        dtype=dtype,
        gradient_sequences=settings.gradient_sequences,
        step_tokens=step_tokens,
        journal=journal,
        ranks=ranks,
        progress=progress,
    )

    judge_of = partial(
        judge,
        decoder,
        calibration=calibration,
        settings=settings,
        stats=stats,
        dtype=dtype,
        step_tokens=step_tokens,
        journal=journal,
        progress=progress,
    )

    def decide() -> Entry:
        return Entry(facts=_decide(decoder, name, calibration, settings, stats, dtype, judge_of).to_json())

    # the moments, which a search reads, lie with the first process
    found = ranks.share(lambda: journal.remember("plan", decide).facts)
    return PrunePlan.from_json(found), stats


def _decide(
    decoder: Decoder,
    name: str,
    calibration: Calibration,
    settings: Settings,
    stats: Stats,
    dtype: torch.dtype,
    judge_of: Callable[[], Candidates],
) -> PrunePlan:
    """The plan that the statistics lead to."""
    notes: list[str] = []
    keep = allocate(decoder.model, decoder.groups, stats.scores, settings, stats.influence, judge_of, notes.append)
    plan = _plan_of(decoder, name, calibration, settings, keep, dtype)
    return replace(plan, notes=(*notes, *plan.notes))


def keep_all(
    model: PreTrainedModel | Decoder, name: str, calibration: Calibration, *, dtype: torch.dtype = torch.float32
) -> PrunePlan:
    """A plan that cuts nothing, for a model that only gets zeros."""
    nothing = Settings(0.0, method="none", allocation="none", refit="none", align=1, heads="keep")
    return _plan_of(Decoder.of(model), name, calibration, nothing, {}, dtype)


def _plan_of(
    decoder: Decoder,
    name: str,
    calibration: Calibration,
    settings: Settings,
    keep: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
) -> PrunePlan:
    """What a keep list amounts to, and how it came about."""
    model, groups = decoder.model, decoder.groups
    before = count_parameters(model)
    gone = _parameters_gone(model, groups, keep, settings.mode, _narrowed_kinds(groups, keep))
    blocks = count_parameters(decoder.blocks)
    return PrunePlan(
        model=name,
        model_type=model.config.model_type,
        method=settings.method,
        allocation=settings.allocation,
        heads=settings.heads,
        refit=settings.refit,
        recover=settings.recover,
        ratio_asked=settings.ratio,
        ratio_reached=gone / before,
        parameters_before=before,
        parameters_after=before - gone,
        block_parameters_before=blocks,
        block_parameters_after=blocks - gone,
        align=settings.align,
        seed=calibration.seed,
        dtype=str(dtype).removeprefix("torch."),
        calibration=calibration.record(),
        edgeprune_version=__version__,
        keep=keep,
        units={group.name: group.units for group in groups},
        notes=(*_ratio_notes(settings, gone / before), *_refit_notes(settings, len(calibration.ids))),
    )


def allocate(
    model: PreTrainedModel,
    groups: Sequence[Group],
    scores: Mapping[str, torch.Tensor],
    settings: Settings,
    influence: Sequence[float] = (),
    judge_of: Callable[[], Judge] | None = None,
    remark: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[int, ...]]:
    """Keep list that removes `settings.ratio` of all parameters.

    Args:
        model: the dense model; only its config and shapes are read.
        groups: its groups.
        scores: what the units are worth, by group.
        settings: how to prune.
        influence: how much each block turns the hidden state.
        judge_of: makes what judges candidates (`judge`), for allocations that need it.
        remark: told what the user should know of the choice.

    Raises:
        EdgepruneError: if the layers cannot give so much, or not under this allocation.
    """
    problem = replace(make_problem(model, groups, scores, settings, influence), remark=remark)
    total = count_parameters(model)
    if problem.remove > problem.removable:
        raise EdgepruneError(
            f"ratio {settings.ratio:g} cannot be reached: at most {problem.removable / total:.3f} of all parameters "
            f"can leave with at least one head and {settings.min_channels} channels in each layer; ask for less"
        )
    name, _, argument = settings.allocation.partition(":")
    method = plugins.find("allocation", name, "allocation")
    if settings.reads_moments:
        assert judge_of is not None, f"{settings.allocation} judges candidates, and nobody said how"
        problem = replace(problem, judge=judge_of())
    keep: dict[str, tuple[int, ...]] = method.allocate(problem, argument or None)
    check_keep(groups, keep)
    wanted = round(settings.ratio * total)
    reached = _parameters_gone(model, groups, keep, settings.mode, settings.cut_kinds)
    step = settings.align * sum(problem.channel_cost(layer) for layer in problem.layers)
    if abs(reached - wanted) > max(RATIO_TOLERANCE * total, step / 2):
        raise EdgepruneError(
            f"allocation {settings.allocation} reaches a ratio of {reached / total:.3f} instead of {settings.ratio:g}: "
            "the layers that it may cut cannot give more; ask for less, or for another allocation"
        )
    return keep


def judge(
    model: PreTrainedModel | Decoder,
    calibration: Calibration,
    settings: Settings,
    stats: Stats,
    dtype: torch.dtype = torch.float32,
    *,
    step_tokens: int = BATCH_TOKENS,
    journal: Journal | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Candidates:
    """What judges whole candidates, on the calibration sequences that the refit keeps aside.

    Raises:
        EdgepruneError: if too few sequences are kept aside.
    """
    settings.check_sequences(len(calibration.ids))
    return Candidates(
        Decoder.of(model),
        stats.moments,
        held_out(calibration.ids),
        is_refitted=settings.refit not in ("none", "bias"),
        dtype=dtype,
        step_tokens=step_tokens,
        journal=Journal() if journal is None else journal,
        progress=progress,
    )


def make_problem(
    model: PreTrainedModel,
    groups: Sequence[Group],
    scores: Mapping[str, torch.Tensor],
    settings: Settings,
    influence: Sequence[float] = (),
) -> Problem:
    """The allocation problem of a model: its layers, what their units are worth and what they cost.

    Where the refit adds intercepts, their parameters have to leave as well; they are counted for every kind of group
    that may be narrowed.
    """
    shapes, grown = _shapes_after_refit(model, groups, settings.mode, settings.cut_kinds)
    costs = {group.name: unit_parameters(group, shapes) for group in groups}
    layers = []
    for _, members in itertools.groupby(groups, lambda group: group.layer):
        by_kind = {group.kind: group for group in members}
        parts = by_kind["kv_heads"], by_kind["heads"], by_kind["channels"]
        layers.append(Layer(*parts, scores, costs, keeps_heads=settings.heads == "keep"))
    total = count_parameters(model)
    return Problem(
        layers,
        remove=round(settings.ratio * total) + grown,
        align=settings.align,
        min_channels=settings.min_channels,
        heads=settings.heads,
        influence=influence,
        fits=stock_counts(model.config, groups) if settings.is_uniform else any_counts,
        tolerance=RATIO_TOLERANCE * total,
    )


def _shapes_after_refit(
    model: PreTrainedModel, groups: Sequence[Group], mode: Mode, kinds: Collection[Kind]
) -> tuple[dict[str, LinearShape], int]:
    """Shapes of the Linears, not cut but with the intercepts that the refit adds; and how many values those are."""
    before = linear_shapes(model, groups)
    after = shapes_with_intercepts(model.config.model_type, before, groups, mode, kinds)
    return after, sum(after[name].parameters - before[name].parameters for name in before)


def _parameters_gone(
    model: PreTrainedModel,
    groups: Sequence[Group],
    keep: Keep,
    mode: Mode,
    kinds: Collection[Kind],
) -> int:
    """Number of parameters that a model has less after refit and cut; these kinds of groups get intercepts."""
    shapes, grown = _shapes_after_refit(model, groups, mode, kinds)
    return parameters_removed(groups, keep, shapes) - grown


def apply_plan(
    model: PreTrainedModel | Decoder,
    plan: PrunePlan,
    moments: Mapping[str, Moments],
    calibration: Calibration | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    step_tokens: int = BATCH_TOKENS,
    journal: Journal | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Outcome]:
    """Refit (if the plan says so) and cut a model in place, block by block.

    Args:
        model: the dense model; a streamed one reads its cut blocks from the journal afterwards.
        plan: what stays.
        moments: moments of the inputs of its Linears that read units; empty if the plan refits nothing.
        calibration: the tokens that the refit "reconstruct" reads; the other modes know enough by the moments.
        dtype: of the matrix products of that refit.
        step_tokens: tokens that go through a block at once there.
        journal: remembers every block that is cut; in memory by default.
        progress: told of every block.

    Returns:
        Name of each refitted Linear, and of each reconstructed MLP -> how that went.
    """
    decoder, journal = Decoder.of(model), Journal() if journal is None else journal
    groups, (mode, passes) = decoder.groups, parse_refit(plan.refit)
    check_keep(groups, plan.keep)
    kinds = _narrowed_kinds(groups, plan.keep)
    narrowed = sorted({group.layer for group in groups if _is_narrowed(group, plan.keep)})
    paths = None
    if mode == "reconstruct" and narrowed:
        assert calibration is not None, "a reconstruction needs the calibration tokens"
        ids = altered(calibration.ids, decoder.config.get_text_config().vocab_size)
        paths = Paths(decoder, ids, dtype, journal, passes=passes, step_tokens=step_tokens)
    outcomes: dict[str, Outcome] = {}
    for layer, members in itertools.groupby(groups, lambda group: group.layer):
        progress("refit and cut", layer, decoder.layers)
        of_layer, step = list(members), f"cut-{layer}"
        # intercepts go to all blocks, as a config has one switch for all
        is_mended = mode in ("intercept", "bias") or (paths is not None and layer > narrowed[0])
        if is_mended or _narrowed_kinds(of_layer, plan.keep):
            if step in journal:
                decoder.release(layer)
                carry_intercepts(decoder.model, of_layer, mode, kinds)
                shrink_blocks(decoder.model, of_layer, plan.keep)
            else:
                if paths is not None:
                    paths.advance_dense(layer)
                reconstruct = None if paths is None else partial(paths.fit, layer, is_first=layer == narrowed[0])
                journal.put(step, _cut_block(decoder, layer, of_layer, plan, mode, kinds, moments, reconstruct))
            names = decoder.blocks[layer].state_dict()
            decoder.read_from(layer, {name: partial(journal.tensor, step, name) for name in names})
            outcomes |= {name: Outcome(**facts) for name, facts in journal.facts(step).items()}
        elif paths is not None and f"path-{layer}" not in journal:
            paths.advance_dense(layer)
            journal.put(f"path-{layer}", Entry())
        if paths is not None:
            paths.forget(layer)
        if journal.folder is not None:
            journal.forget(*(moments_entry(group.inner.module) for group in of_layer if group.kind != "kv_heads"))
    if paths is not None:
        paths.forget(decoder.layers)
    progress("refit and cut", decoder.layers, decoder.layers)
    set_widths(decoder.config, layer_widths(groups, plan.keep))
    return outcomes


def progress_so_far(journal: Journal, layers: int) -> str | None:
    """Where a run continues, in words; None if it begins."""

    def done(step: str) -> list[int]:
        return [layer for layer in range(layers) if f"{step}-{layer}" in journal]

    def after(following: int, what: str) -> str:
        where = f"from block {following + 1} of {layers}" if following in range(layers) else "after the last block"
        return f"continues {where} ({what})"

    if sparse := done("sparse"):
        return after(sparse[-1] + 1, "zeros in the weights")
    if RECOVER in journal:
        return "continues after the last step (recover)"
    if ADAPTERS in journal:
        facts = journal.facts(ADAPTERS)
        return f"continues after step {facts['done']} of {facts['steps']} (recover)"
    if cut := done("cut"):
        return after(cut[-1] + 1, "refit and cut")
    if asked := done(TEACHER):
        return after(asked[-1] + 1, "dense model, to learn from")
    if "plan" in journal:
        return "continues after the plan"
    judged = itertools.takewhile(lambda number: f"{SEARCH_STEP}-{number}" in journal, itertools.count(1))
    answers = len(list(judged))
    if begun := done(f"{SEARCH_STEP}-{answers + 1}"):
        return after(begun[-1] + 1, f"widths, candidate {answers + 1}")
    if answers:
        return f"continues after {answers} judged candidates (widths)"
    if graded := done("gradients"):
        return after(graded[0] - 1, "gradients")  # they go backward
    if seen := done("statistics"):
        return after(seen[-1] + 1, "statistics")
    return None


def _is_narrowed(group: Group, keep: Keep) -> bool:
    return len(kept(keep, group)) < group.units


def _narrowed_kinds(groups: Sequence[Group], keep: Keep) -> frozenset[Kind]:
    return frozenset(group.kind for group in groups if _is_narrowed(group, keep))


def _cut_block(
    decoder: Decoder,
    layer: int,
    groups: Sequence[Group],
    plan: PrunePlan,
    mode: Mode,
    kinds: Collection[Kind],
    moments: Mapping[str, Moments],
    reconstruct: Callable[[torch.nn.Module, Sequence[Group]], tuple[str, Outcome]] | None,
) -> Entry:
    """The tensors of a block, refitted and cut in place, and how the refit of each Linear went."""
    outcomes = {}
    with decoder.block(layer) as block:
        carry_intercepts(decoder.model, groups, mode, kinds)
        for group in groups:
            if mode == "none" or group.kind == "kv_heads" or not _is_narrowed(group, plan.keep):
                continue
            name = group.inner.module
            linear = linear_of(decoder.model, name)
            outcomes[name] = asdict(refit_linear(linear, group, kept(plan.keep, group), moments[name], mode))
        shrink_blocks(decoder.model, groups, plan.keep)
        if reconstruct is not None:
            name, outcome = reconstruct(block, groups)
            outcomes[name] = asdict(outcome)
        return Entry(decoder.finite_tensors(layer, "the refitted model"), outcomes)


def _refit_notes(settings: Settings, sequences: int) -> tuple[str, ...]:
    if settings.refit == "none" or sequences >= HELD_OUT_EVERY:
        return ()
    return (
        f"nobody judged the refit: {sequences} calibration sequences are too few to keep any aside, and a fit to so "
        f"few tokens can be worse than none; give --calibration-sequences {HELD_OUT_EVERY} or more",
    )


def _ratio_notes(settings: Settings, reached: float) -> tuple[str, ...]:
    if abs(reached - settings.ratio) <= RATIO_TOLERANCE:
        return ()
    return (
        f"asked to remove {settings.ratio:.1%}, reached {reached:.1%}: --allocation {settings.allocation} goes by "
        f"steps of {settings.align} channels; a smaller --align comes nearer, another --allocation may",
    )
