"""Structured optimal brain surgeon: the output error that remains once all other weights have made up for a unit.

ZipLM (arXiv 2302.04089), OSSCAR (arXiv 2403.12983) and Tyr (arXiv 2503.09657) for the inputs X of o_proj and down_proj
W `(D, C)`. With H = X^T X / tokens + lam I, removing the columns S and refitting the rest costs exactly

    tr(W_S ([H^-1]_SS)^-1 W_S^T)

and leaves the same problem on the other columns, with

    W    <- W    - W_S    ([H^-1]_SS)^-1 [H^-1]_S:
    H^-1 <- H^-1 - [H^-1]_:S ([H^-1]_SS)^-1 [H^-1]_S:

So units are removed greedily: the cheapest first, heads one by one, channels in `ROUNDS` rounds. One run orders all
units and gives the error for every count at once. The scores are that curve: units that go later score higher, and the
sum of the scores of the first n is the error of removing n, or a little above where the curve is not convex. The sum of
all is the energy tr(W H W^T), so scores divided by their sum are relative errors. They hold only together with the
least-squares refit: without it this choice is worse than a plain one.

A KV head leaves with all its query heads. The error of that is found by the same greedy removal of whole KV heads, and
its own score is what this joint error has above (or below) the scores of its query heads.

Cost for C columns: about 2 C^3 + C^2 D operations in float64, and memory for H^-1 and a copy of W (C = 11008,
D = 4096: 1.0 + 0.4 GB).
"""

from dataclasses import dataclass

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence, known
from edgeprune_runtime.errors import EdgepruneError

NEEDS = frozenset({"inputs"})

DAMPING = 0.01
"""lam as a share of the mean diagonal of the Gram matrix: what ZipLM and SparseGPT use."""

ROUNDS = 24
"""Channels leave in so many rounds, each seeing the errors that the earlier ones left."""

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Removal:
    """Greedy removal of all units.

    Attributes:
        order: `(units,)` int64, the units as they go.
        errors: `(units,)` float64, by how much the output error grows as each goes. Of units that go in one round
            only the sum is exact; it is shared out in proportion to their single errors.
        rounds: how many units each round removes.
    """

    order: torch.Tensor
    errors: torch.Tensor
    rounds: tuple[int, ...]

    def scores(self) -> torch.Tensor:
        """The errors made rising, by unit: float32 `(units,)`, no two alike, so that any cut follows the order."""
        rising = self.errors.cummax(0).values.float()
        # floats that are not negative rank as their bits do: the next bit pattern is the next larger number
        steps = torch.arange(len(rising), dtype=torch.int32)
        distinct = (rising.view(torch.int32) - steps).cummax(0).values + steps
        return torch.empty_like(rising).scatter_(0, self.order, distinct.view(torch.float32))


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """Output error that each unit's removal adds: float32 `(units,)`.

    Raises:
        EdgepruneError: if the moments of the inputs are not finite.
    """
    reader = evidence.inner
    assert reader is not None, "a group without a Linear that reads its units"
    gram = known(reader.gram)
    if group.kind != "kv_heads":
        return remove_greedily(reader.weight, gram, reader.slot.size).scores()
    each = remove_greedily(reader.weight, gram, reader.slot.size).scores().reshape(group.units, -1).sum(1)
    return remove_greedily(reader.weight, gram, len(gram) // group.units).scores() - each


def remove_greedily(weight: torch.Tensor, gram: torch.Tensor, size: int) -> Removal:
    """Order in which units go, and what each costs.

    Args:
        weight: `(C, D)`, what reads each column.
        gram: `(C, C)`, X^T X / tokens.
        size: consecutive columns of a unit. Units of one column go in rounds, larger ones one by one.

    Raises:
        EdgepruneError: if the Gram matrix is not finite.
    """
    alive = torch.arange(len(gram) // size)
    at_once = 1 if size > 1 else -(-len(alive) // ROUNDS)
    rounds = tuple(min(at_once, len(alive) - done) for done in range(0, len(alive), at_once))
    damping = DAMPING * float(gram.diagonal().double().mean())
    if damping == 0:  # nothing ever came in, so nothing is lost
        return Removal(alive, torch.zeros(len(alive), dtype=torch.float64), rounds)
    inverse, weight = _inverse(gram, damping), weight.double()
    order, errors = [], []
    for count in rounds:
        singles = _single_errors(inverse, weight, size)
        is_gone = torch.zeros(len(alive), dtype=torch.bool)
        cheapest = singles.argsort(stable=True)[:count]
        is_gone[cheapest] = True
        gone, rest = (mask.repeat_interleave(size).nonzero().squeeze(1) for mask in (is_gone, ~is_gone))
        factor = _cholesky(inverse[gone][:, gone])
        solved = torch.cholesky_solve(weight[gone], factor)
        joint = (weight[gone] * solved).sum()
        shares = singles[cheapest] / singles[cheapest].sum().clamp_min(torch.finfo(torch.float64).tiny)
        order.append(alive[cheapest])
        errors.append(joint * shares)

        across = inverse[gone][:, rest]
        weight = weight[rest].addmm_(across.T, solved, alpha=-1)
        half = torch.linalg.solve_triangular(factor, across, upper=False)
        inverse = _shrunk(inverse, rest).addmm_(half.T, half, alpha=-1)
        alive = alive[~is_gone]
    return Removal(torch.cat(order), torch.cat(errors), rounds)


def _single_errors(inverse: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    """`tr(W_u ([H^-1]_uu)^-1 W_u^T)` of every unit alone: `(units,)`."""
    if size == 1:
        return weight.square().sum(1) / inverse.diagonal()
    units = len(inverse) // size
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    by_unit = weight.view(units, size, -1)
    return (by_unit * torch.cholesky_solve(by_unit, _cholesky(blocks))).sum((1, 2))


def _inverse(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """`(gram + damping I)^-1` float64, in one buffer."""
    matrix = gram.to(torch.float64, copy=True)
    matrix.diagonal().add_(damping)
    matrix = _cholesky(matrix, out=matrix)
    return torch.cholesky_inverse(matrix, out=matrix)


def _cholesky(matrix: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    places = None if out is None else (out, torch.empty(0, dtype=torch.int32))
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix, out=places)
    if failed.any() or not torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all():
        raise EdgepruneError(
            f"the Gram matrix of {matrix.shape[-1]} inputs cannot be inverted; expected finite calibration "
            "activations: check the model on this text, or calibrate in float32"
        )
    return factor


def _shrunk(matrix: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The rows and columns `rest` (sorted) of a square matrix, moved to the front of its own storage."""
    width, flat = len(rest), matrix.view(-1)
    for start in range(0, width, ROWS_AT_ONCE):
        # a row never moves back, and those of a stretch are copied before it is written
        rows = matrix[rest[start : start + ROWS_AT_ONCE]][:, rest]
        flat[start * width : start * width + rows.numel()] = rows.view(-1)
    return flat[: width * width].view(width, width)
