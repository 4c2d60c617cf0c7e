"""Closed-form refit: the Linears that read units (o_proj, down_proj) learn to do without the ones that went.

For inputs X `(tokens, K)` of weight W `(D, K)`, H = X^T X / tokens, kept inputs S and removed ones R, the kept columns
become

    W_S* = argmin_V ||X W^T - X_S V^T||^2 / tokens + lam ||V - W_S||^2
         = W_S + W_R H[R, S] (H[S, S] + lam I)^-1

The ridge pulls toward the original weights, so a large lam changes nothing and a singular H does no harm. With lam = 0
and a regular H it is the optimal brain surgeon's update of all kept weights at once.

An intercept b makes up for the mean of what went: the same formula, the same lam, on centred inputs (H - mean mean^T):

    b = W mean - W_S* mean_S

FLAP's bias (arXiv 2312.11983) is the case W_S* = W_S. A model carries intercepts only if its config has a switch that
gives biases to its Linears (`carry_intercepts`).

The calibration tokens kept aside judge: lam is the one of `RIDGES` that misses least of their outputs, and the update
is accepted only if it misses less of them than the plain cut does. An accepted update is then fitted on all tokens,
also where a reconstruction follows that the same tokens judge: without them its start, and in the end the model, was
worse (stories260K, 16 and 64 sequences: 0.1 to 0.8 % more perplexity at 50 %).
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from edgeprune.configs import architecture
from edgeprune.groups import Group, Kind
from edgeprune.shrink import Linear, LinearShape, linear_of, weight_of
from edgeprune.statistics import Moments
from edgeprune_runtime.errors import EdgepruneError

Mode = Literal["none", "least-squares", "reconstruct", "intercept", "bias"]
"""What is refitted: nothing; the kept weights; these, and then the whole MLP (`edgeprune.reconstruct`); the kept
weights and an intercept; the intercept alone."""

RIDGES = (1e-3, 1e-2, 1e-1, 0.5)
"""lam as a share of the mean diagonal of H, to choose from: little text wants much of it."""

PASSES, MOST_PASSES = 3, 1000
"""How often a reconstruction sees every token, if nobody says; and at most."""

DAMPING = 0.01
"""lam where no tokens are kept aside: what SparseGPT (arXiv 2301.00774) and ZipLM use."""

JUDGED_OUTPUTS = 512
"""A Linear with more outputs is judged on so many random combinations of them, the same for all that are compared."""


@dataclass(frozen=True)
class Outcome:
    """How a refit went; errors are shares of the full Linear's output energy that are lost; of MLPs see `aims`.

    Attributes:
        damping: the ridge that was best, as a share of the mean diagonal of H; None in modes that fit no weights.
        is_accepted: whether the update is in the weights; else they are the plain cut.
        held_out_error_before: of the plain cut, on the tokens kept aside; None without any.
        held_out_error: of the update, fitted on the other tokens; None without any.
        error: of the weights that came out, on all calibration tokens.
    """

    damping: float | None
    is_accepted: bool
    held_out_error_before: float | None
    held_out_error: float | None
    error: float


@dataclass(frozen=True)
class Refitted:
    """Kept columns `(D, S)`, and what to add to the bias `(D,)` (None for nothing)."""

    weight: torch.Tensor
    intercept: torch.Tensor | None
    outcome: Outcome


@dataclass(frozen=True)
class _Update:
    """What is added to the kept columns `(D, S)` and to the bias `(D,)`; None for nothing."""

    weight: torch.Tensor | None = None
    intercept: torch.Tensor | None = None


def refit(weight: torch.Tensor, moments: Moments, kept_columns: torch.Tensor, mode: Mode = "least-squares") -> Refitted:
    """The kept columns of a Linear, made to miss as little as possible of its full output.

    Args:
        weight: the full weight `(D, K)`.
        moments: moments of its K inputs.
        kept_columns: sorted int64 indices of the S inputs that stay.
        mode: what to fit.

    Raises:
        EdgepruneError: if the moments are not finite, or the system is singular even with its ridge.
    """
    sides = _sides(weight, moments, kept_columns)
    directions = _directions(len(weight))
    removed = weight[:, sides[1]].double()
    judged = _along(directions, removed)
    damping = DAMPING if mode in ("least-squares", "reconstruct", "intercept") else None
    is_accepted = mode != "none"
    before: float | None = None
    after: float | None = None
    if is_accepted and moments.held_out_gram is not None:
        energy = _energy(directions, weight, moments.held_out_gram)
        plain, missed, damping = _judge(judged, moments, sides, mode)
        before, after, is_accepted = _share(plain, energy), _share(missed, energy), missed < plain
    inputs = _Inputs.all(moments, *sides)
    update = _fit(removed, inputs, mode, damping) if is_accepted else _Update()
    if update is None:
        raise _singular(inputs, damping or 0.0)
    seen = _Update(*(part if part is None else _along(directions, part) for part in (update.weight, update.intercept)))
    fitted = weight[:, kept_columns]
    return Refitted(
        weight=fitted if update.weight is None else (fitted + update.weight).to(weight.dtype),
        intercept=None if update.intercept is None else update.intercept.to(weight.dtype),
        outcome=Outcome(
            damping=damping,
            is_accepted=is_accepted,
            held_out_error_before=before,
            held_out_error=after,
            error=_share(_missed(judged, inputs, seen), _energy(directions, weight, moments.gram)),
        ),
    )


def refit_unjudged(weight: torch.Tensor, moments: Moments, kept_columns: torch.Tensor) -> torch.Tensor:
    """The kept columns `(D, S)` by least squares at the ridge `DAMPING`, and nothing of how that went; see `refit`."""
    sides = _sides(weight, moments, kept_columns)
    inputs = _Inputs.all(moments, *sides)
    update = _fit(weight[:, sides[1]].double(), inputs, "least-squares", DAMPING)
    if update is None or update.weight is None:
        raise _singular(inputs, DAMPING)
    return (weight[:, kept_columns] + update.weight).to(weight.dtype)


def parse_refit(text: str) -> tuple[Mode, int]:
    """The mode that `MODE` or `reconstruct:PASSES` names, and the passes of its reconstruction (0 without one).

    Raises:
        EdgepruneError: if there is no such mode, or no such number of passes.
    """
    name, colon, passes = text.partition(":")
    if name not in get_args(Mode):
        raise EdgepruneError(f"unknown refit {text!r}; expected {', '.join(get_args(Mode))}, or reconstruct:PASSES")
    mode = cast("Mode", name)
    if not colon:
        return mode, PASSES if mode == "reconstruct" else 0
    found = read_passes(passes)
    if mode != "reconstruct" or found is None:
        raise EdgepruneError(
            f"refit {text!r} was not understood; only reconstruct has passes, 1 to {MOST_PASSES}, such as reconstruct:5"
        )
    return mode, found


def read_passes(text: str) -> int | None:
    """The number of passes that a text names, 1 to `MOST_PASSES`; None if it names none."""
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_PASSES))
    return int(text) if is_number and 1 <= int(text) <= MOST_PASSES else None


def refit_linear(linear: Linear, group: Group, units: Sequence[int], moments: Moments, mode: Mode) -> Outcome:
    """Refit the Linear that reads a group, in place, to do with some of its units; nothing is cut yet.

    The kept columns get their new values, and the bias the intercept (`carry_intercepts` has made room for it).
    """
    weight, columns = weight_of(linear), torch.tensor(group.inner.lines(units))
    assert weight.shape[1] == len(moments.mean), "moments of another Linear"
    with torch.no_grad():
        found = refit(weight, moments, columns, mode)
        weight[:, columns] = found.weight
        if found.intercept is not None:
            assert linear.bias is not None, "carry_intercepts was not called"
            linear.bias.add_(found.intercept)
    return found.outcome


def check_intercepts(model_type: str, mode: Mode, kinds: Iterable[Kind]) -> None:
    """Check that checkpoints of this architecture can carry the intercepts that a mode finds.

    Raises:
        EdgepruneError: if they cannot, for one of the kinds of groups that are cut.
    """
    if mode not in ("intercept", "bias"):
        return
    switches = _switches(model_type)
    for kind in kinds:
        if kind != "kv_heads" and kind not in switches:
            reader = "o_proj" if kind == "heads" else "down_proj"
            raise EdgepruneError(
                f"refit {mode} gives {reader} a bias, and a {model_type} config has no switch for one; "
                "expected least-squares, reconstruct or none"
            )


def shapes_with_intercepts(
    model_type: str,
    shapes: Mapping[str, LinearShape],
    groups: Sequence[Group],
    mode: Mode,
    kinds: Collection[Kind],
) -> dict[str, LinearShape]:
    """Shapes of the Linears as `carry_intercepts` leaves them, before a cut; nothing is changed."""
    with_bias = set(_carriers(model_type, groups, mode, kinds))
    return {name: replace(shape, has_bias=shape.has_bias or name in with_bias) for name, shape in shapes.items()}


def carry_intercepts(model: PreTrainedModel, groups: Sequence[Group], mode: Mode, kinds: Collection[Kind]) -> int:
    """Give the Linears of these kinds of groups biases of zero, as the switch in the config does for all of them.

    The architecture file names the switches (`INTERCEPT`). One that is on already changes nothing, and some need none.

    Returns:
        Number of parameters that the model grew by.

    Raises:
        EdgepruneError: if the architecture has no such switch; the model is untouched then.
    """
    check_intercepts(model.config.model_type, mode, kinds)
    grown = 0
    for name, switch in _carriers(model.config.model_type, groups, mode, kinds).items():
        setattr(model.config, switch, True)
        linear = linear_of(model, name)
        if linear.bias is None:
            outputs = LinearShape.of(linear).out_features
            linear.bias = nn.Parameter(linear.weight.new_zeros(outputs))
            grown += outputs
    return grown


def _carriers(model_type: str, groups: Sequence[Group], mode: Mode, kinds: Collection[Kind]) -> dict[str, str]:
    """Name of each Linear that a switch gives a bias -> that switch, of those that kinds of groups need."""
    if mode not in ("intercept", "bias"):
        return {}
    switches = _switches(model_type)
    wanted = {switches[kind] for kind in kinds if kind in switches}
    of_kind: dict[Kind, str | None] = {**switches, "kv_heads": switches.get("heads")}
    carriers: dict[str, str] = {}
    for group in groups:
        switch = of_kind.get(group.kind)
        if switch is not None and switch in wanted:
            carriers |= {slot.module: switch for slot in group.slots}
    return carriers


def _switches(model_type: str) -> Mapping[Kind, str | None]:
    """Kind of group -> the switch for biases in the config, None where the Linear that reads it always has one."""
    switches: Mapping[Kind, str | None] = getattr(architecture(model_type), "INTERCEPT", {})
    return switches


def _sides(weight: torch.Tensor, moments: Moments, kept_columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the inputs that stay, and of those that go.

    Raises:
        EdgepruneError: if the moments are not finite.
    """
    if not all(bool(torch.isfinite(known).all()) for known in (moments.gram, moments.mean)):
        raise EdgepruneError(
            f"the moments of {weight.shape[1]} inputs are not finite; expected finite calibration activations: "
            "check the model on this text, or calibrate in float32"
        )
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool).index_fill_(0, kept_columns, True)
    return kept_columns, (~is_kept).nonzero().squeeze(1)


@dataclass(frozen=True)
class _Inputs:
    """Moments of one part of the tokens as a cut needs them, float64; S inputs stay, R go.

    Attributes:
        kept: `(S, S)`, H of the kept inputs.
        across: `(R, S)`, H of the removed with the kept.
        gone: `(R, R)`, H of the removed inputs.
        kept_mean: `(S,)`.
        gone_mean: `(R,)`.
        scale: mean diagonal of the whole H.
    """

    kept: torch.Tensor
    across: torch.Tensor
    gone: torch.Tensor
    kept_mean: torch.Tensor
    gone_mean: torch.Tensor
    scale: float

    @classmethod
    def all(cls, moments: Moments, kept: torch.Tensor, gone: torch.Tensor) -> "_Inputs":
        """Of all calibration tokens."""
        return cls._of([(moments.gram, moments.mean, 1.0)], kept, gone)

    @classmethod
    def held_out(cls, moments: Moments, kept: torch.Tensor, gone: torch.Tensor) -> "_Inputs":
        """Of the tokens kept aside."""
        assert moments.held_out_gram is not None
        assert moments.held_out_mean is not None
        return cls._of([(moments.held_out_gram, moments.held_out_mean, 1.0)], kept, gone)

    @classmethod
    def fitting(cls, moments: Moments, kept: torch.Tensor, gone: torch.Tensor) -> "_Inputs":
        """Of the tokens not kept aside; only the stretches that are read are computed, as H may be large."""
        assert moments.held_out_gram is not None
        assert moments.held_out_mean is not None
        share = moments.held_out_share
        terms = [
            (moments.gram, moments.mean, 1 / (1 - share)),
            (moments.held_out_gram, moments.held_out_mean, -share / (1 - share)),
        ]
        return cls._of(terms, kept, gone)

    @classmethod
    def _of(
        cls, terms: Sequence[tuple[torch.Tensor, torch.Tensor, float]], kept: torch.Tensor, gone: torch.Tensor
    ) -> "_Inputs":
        """Of a weighted sum of (H, mean, factor)."""

        def block(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
            for gram, _, factor in terms:
                total.add_(gram[rows][:, columns], alpha=factor)
            return total

        def mean(columns: torch.Tensor) -> torch.Tensor:
            return torch.stack([factor * mean[columns].double() for _, mean, factor in terms]).sum(0)

        scale = sum(factor * float(gram.diagonal().double().mean()) for gram, _, factor in terms)
        return cls(block(kept, kept), block(gone, kept), block(gone, gone), mean(kept), mean(gone), scale)


def _fit(removed: torch.Tensor, inputs: _Inputs, mode: Mode, damping: float | None) -> _Update | None:
    """The update that makes up for the removed columns `(D, R)` on these inputs; None if the system is singular."""
    lost_mean = removed @ inputs.gone_mean
    if damping is None:
        return _Update(intercept=lost_mean)
    system, target = inputs.kept.clone(), removed @ inputs.across
    if mode == "intercept":
        system.addr_(inputs.kept_mean, inputs.kept_mean, alpha=-1)
        target.addr_(lost_mean, inputs.kept_mean, alpha=-1)
    system.diagonal().add_(damping * inputs.scale if inputs.scale > 0 else 1.0)
    factor, failed = torch.linalg.cholesky_ex(system, out=(system, torch.empty(0, dtype=torch.int32)))
    if failed:
        return None
    weight = torch.cholesky_solve(target.T, factor).T
    return _Update(weight, lost_mean - weight @ inputs.kept_mean if mode == "intercept" else None)


def _singular(inputs: _Inputs, damping: float) -> EdgepruneError:
    return EdgepruneError(
        f"the Gram matrix of {len(inputs.kept)} inputs is singular even with a ridge of {damping:g}; "
        "expected more calibration text, or calibrate in float32"
    )


def _judge(
    removed: torch.Tensor, moments: Moments, sides: tuple[torch.Tensor, torch.Tensor], mode: Mode
) -> tuple[float, float, float | None]:
    """What the plain cut and the best update miss on the tokens kept aside, and that update's ridge."""
    held_out, fitting = _Inputs.held_out(moments, *sides), _Inputs.fitting(moments, *sides)
    ridges: tuple[float | None, ...] = (None,) if mode == "bias" else RIDGES
    updates = ((damping, _fit(removed, fitting, mode, damping)) for damping in ridges)
    # on little text the smallest ridges may be too small for the rounding of H
    trials = [(_missed(removed, held_out, update), damping) for damping, update in updates if update is not None]
    if not trials:
        raise _singular(held_out, max(RIDGES))
    missed, best = min(trials, key=lambda trial: trial[0])
    return _missed(removed, held_out, _Update()), missed, best


def _missed(removed: torch.Tensor, inputs: _Inputs, update: _Update) -> float:
    """Mean square over the tokens of what the outputs miss, `W_R x_R - U x_S - b`, summed over the outputs."""
    missed = float((removed @ inputs.gone * removed).sum())
    lost_mean = removed @ inputs.gone_mean
    if update.weight is not None:
        missed += float(((update.weight @ inputs.kept - 2 * removed @ inputs.across) * update.weight).sum())
        lost_mean = lost_mean - update.weight @ inputs.kept_mean
    if update.intercept is not None:
        missed += float(((update.intercept - 2 * lost_mean) * update.intercept).sum())
    return max(missed, 0.0)


def _directions(outputs: int) -> torch.Tensor | None:
    """`(JUDGED_OUTPUTS, outputs)` float64, random combinations that keep mean squares; None where all are judged."""
    if outputs <= JUDGED_OUTPUTS:
        return None
    drawn: torch.Tensor = torch.randn(
        JUDGED_OUTPUTS, outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return drawn / math.sqrt(JUDGED_OUTPUTS)


def _along(directions: torch.Tensor | None, update: torch.Tensor) -> torch.Tensor:
    """Outputs `(D, ...)` seen along the directions."""
    return update if directions is None else directions @ update


def _energy(directions: torch.Tensor | None, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """Mean square over the tokens of the full outputs, summed."""
    seen = _along(directions, weight.double()).float()
    return float((seen @ gram).mul_(seen).sum(dtype=torch.float64))


def _share(missed: float, energy: float) -> float:
    return missed / energy if energy > 0 else 0.0
