"""From a model and calibration tokens to a plan, and from a plan to a smaller model.

The order of the papers: group, estimate, allocate (`make_plan`), then refit and cut (`apply_plan`).
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from transformers import PreTrainedModel

from edgeprune import plugins
from edgeprune.budget import Heads, Layer, Problem
from edgeprune.calibration import Calibration
from edgeprune.configs import architecture
from edgeprune.groups import Group, Keep, check_keep, kept
from edgeprune.plan import PrunePlan
from edgeprune.refit import output_error, refit
from edgeprune.shrink import linear_shapes, parameters_removed, shrink, unit_parameters
from edgeprune.sources import count_parameters
from edgeprune.statistics import Method, Moments, Progress, Stats, blocks_name, gather
from edgeprune_runtime import __version__
from edgeprune_runtime.errors import EdgepruneError

LARGEST_RATIO = 0.9
RATIO_TOLERANCE = 0.005
"""Contract: the ratio is reached within this share of all parameters, unless alignment forbids."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to prune.

    Attributes:
        ratio: share of all parameters (tied ones once) to remove, above 0 to 0.9.
        method: importance method, `name` or `name:argument`.
        allocation: `name` or `name:argument`.
        refit: refit o_proj and down_proj by least squares.
        align: kept channel counts are multiples of it.
        min_channels: no MLP keeps fewer channels.
        gradient_sequences: how many calibration sequences the loss gradients see.
        heads: how heads compete with channels: "auto" by lost score, "even" by giving the same share (the papers' way),
            "keep" not at all.
    """

    ratio: float
    method: str = "wanda-sp"
    allocation: str = "protect"
    refit: bool = True
    align: int = 32
    min_channels: int = 64
    gradient_sequences: int = 32
    heads: Heads = "auto"

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
        if self.heads not in get_args(Heads):
            raise EdgepruneError(f"unknown --heads {self.heads!r}; expected {', '.join(get_args(Heads))}")
        if Method.parse(self.method).sampled and self.gradient_sequences < 2:
            raise EdgepruneError(
                f"method {self.method} compares calibration samples; expected --gradient-sequences >= 2"
            )
        name, _, argument = self.allocation.partition(":")
        plugins.find("allocation", name, "allocation").check(argument or None, self.heads)


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


def model_groups(model: PreTrainedModel) -> list[Group]:
    """The groups that the model's architecture file lists."""
    found: list[Group] = architecture(model.config.model_type).groups(model.config)
    return found


def make_plan(
    model: PreTrainedModel,
    name: str,
    calibration: Calibration,
    settings: Settings,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[PrunePlan, Stats]:
    """Estimate what every unit is worth, and decide what stays. The model is not changed.

    Args:
        model: the dense model, float32, in eval mode.
        name: what the plan calls it.
        calibration: the tokens that the statistics see.
        settings: how to prune.
        dtype: of the statistics' matrix products.
        progress: told of every block.

    Raises:
        EdgepruneError: if the settings are wrong or the ratio cannot be reached.
    """
    settings.check()
    groups = model_groups(model)
    stats = gather(
        model,
        groups,
        calibration.ids,
        Method.parse(settings.method),
        with_moments=settings.refit,
        dtype=dtype,
        gradient_sequences=settings.gradient_sequences,
        progress=progress,
    )
    keep = allocate(model, groups, stats.scores, settings)
    before = count_parameters(model)
    shapes = linear_shapes(model, groups)
    gone = parameters_removed(groups, keep, shapes)
    blocks = count_parameters(model.get_submodule(blocks_name(groups)))
    plan = PrunePlan(
        model=name,
        model_type=model.config.model_type,
        method=settings.method,
        allocation=settings.allocation,
        heads=settings.heads,
        refit="least-squares" if settings.refit else "none",
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
        notes=_ratio_notes(settings, gone / before),
    )
    return plan, stats


def allocate(
    model: PreTrainedModel, groups: Sequence[Group], scores: Mapping[str, torch.Tensor], settings: Settings
) -> dict[str, tuple[int, ...]]:
    """Keep list that removes `settings.ratio` of all parameters.

    Raises:
        EdgepruneError: if the layers cannot give so much, or not under this allocation.
    """
    problem = make_problem(model, groups, scores, settings)
    total = count_parameters(model)
    if problem.remove > problem.removable:
        raise EdgepruneError(
            f"ratio {settings.ratio:g} cannot be reached: at most {problem.removable / total:.3f} of all "
            f"parameters can leave "
            f"with at least one head and {settings.min_channels} channels in each layer; ask for less"
        )
    name, _, argument = settings.allocation.partition(":")
    method = plugins.find("allocation", name, "allocation")
    keep: dict[str, tuple[int, ...]] = method.allocate(problem, argument or None)
    check_keep(groups, keep)
    reached = parameters_removed(groups, keep, linear_shapes(model, groups))
    step = settings.align * sum(problem.channel_cost(layer) for layer in problem.layers)
    if abs(reached - problem.remove) > max(RATIO_TOLERANCE * total, step / 2):
        raise EdgepruneError(
            f"allocation {settings.allocation} reaches a ratio of {reached / total:.3f} instead of {settings.ratio:g}: "
            "the layers that it may cut cannot give more; ask for less, or for another allocation"
        )
    return keep


def _columns(group: Group, units: torch.Tensor) -> torch.Tensor:
    """Input columns of the reading Linear that belong to these units, int64."""
    slot = group.inner
    return slot.start + (units[:, None] * slot.size + torch.arange(slot.size)).reshape(-1)


def make_problem(
    model: PreTrainedModel, groups: Sequence[Group], scores: Mapping[str, torch.Tensor], settings: Settings
) -> Problem:
    """The allocation problem of a model: its layers, what their units are worth and what they cost."""
    shapes = linear_shapes(model, groups)
    costs = {group.name: unit_parameters(group, shapes) for group in groups}
    layers = []
    for _, members in itertools.groupby(groups, lambda group: group.layer):
        by_kind = {group.kind: group for group in members}
        parts = by_kind["kv_heads"], by_kind["heads"], by_kind["channels"]
        layers.append(Layer(*parts, scores, costs, keeps_heads=settings.heads == "keep"))
    total = count_parameters(model)
    return Problem(layers, round(settings.ratio * total), settings.align, settings.min_channels, settings.heads)


def apply_plan(
    model: PreTrainedModel,
    plan: PrunePlan,
    moments: Mapping[str, Moments],
    *,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, float]:
    """Refit (if the plan says so) and cut a model in place.

    Returns:
        Name of each refitted Linear -> share of its output energy on the calibration inputs that is lost.
    """
    groups = model_groups(model)
    errors: dict[str, float] = {}
    if plan.refit != "none":
        cut = [group for group in groups if group.kind != "kv_heads" and len(kept(plan.keep, group)) < group.units]
        for done, group in enumerate(cut):
            progress("refit", done, len(cut))
            errors[group.inner.module] = _refit_group(model, group, plan.keep, moments)
        progress("refit", len(cut), len(cut))
    shrink(model, groups, plan.keep)
    return errors


def _refit_group(model: PreTrainedModel, group: Group, keep: Keep, moments: Mapping[str, Moments]) -> float:
    slot = group.inner
    weight = model.get_submodule(slot.module).weight
    assert isinstance(weight, torch.Tensor)
    columns = _columns(group, torch.tensor(kept(keep, group)))
    with torch.no_grad():
        fitted = refit(weight, moments[slot.module], columns)
        error = output_error(weight, moments[slot.module], columns, fitted)
        weight[:, columns] = fitted
    return error


def _ratio_notes(settings: Settings, reached: float) -> tuple[str, ...]:
    if abs(reached - settings.ratio) <= RATIO_TOLERANCE:
        return ()
    return (
        f"asked to remove {settings.ratio:.1%}, reached {reached:.1%}: equal widths in steps of "
        f"{settings.align} channels "
        "come no nearer; --align 1 or another --allocation would",
    )
