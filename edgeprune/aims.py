"""What the MLP of a cut block is fitted to: what it should add, or, in the last block, what the dense model says.

With x what leaves a block on the dense path, t what its MLP would have to add on the pruned path for that, and y what
it adds, so that z = x - t + y leaves the block:

    squared error   ||y - t||^2                                                of  ||t||^2
    divergence      KL(p || q),   p = softmax(head(x)),  q = softmax(head(z))  of  the cross-entropy of p and q

Blocks read each other's states as they are, so there the squared error counts. The last block is read by the head
alone, which normalises its output and passes over most of its directions: fitted to squared errors, it leaves the model
worse than if it is left alone (SmolLM2 cut by 20 %, WikiText-2 valid: 1.70 times the dense perplexity against 1.67;
fitted to the divergence 1.65).
"""

from typing import Protocol

import torch
from torch.nn.functional import log_softmax

from edgeprune.streaming import Pass


class Aim(Protocol):
    """A loss for every token, and the scale that it is a share of.

    Attributes:
        at_once: tokens that are compared together.
        reads_dense: it wants to know x as well.
    """

    at_once: int
    reads_dense: bool

    def lost(self, given: torch.Tensor, target: torch.Tensor, dense: torch.Tensor | None = None) -> torch.Tensor:
        """Loss and scale `(2, S)` float32 of y, t and x, `(S, D)` each."""
        ...


class SquaredError:
    """Squared error, of the target's squared norm."""

    reads_dense = False

    def __init__(self, at_once: int) -> None:
        """Compare so many tokens together."""
        self.at_once = at_once

    def lost(self, given: torch.Tensor, target: torch.Tensor, dense: torch.Tensor | None = None) -> torch.Tensor:
        """See `Aim`."""
        del dense
        return torch.stack([(given - target).square().sum(1), target.square().sum(1)])


class Divergence:
    """Kullback-Leibler divergence of the next token's distribution from the dense model's, of their cross-entropy."""

    reads_dense = True

    def __init__(self, path: Pass) -> None:
        """Ask this model's head."""
        self.at_once = max(1, path.logit_tokens // 2)  # a loss knows one set of logits, this one two
        self._path = path

    def lost(self, given: torch.Tensor, target: torch.Tensor, dense: torch.Tensor | None = None) -> torch.Tensor:
        """See `Aim`."""
        assert dense is not None
        with torch.no_grad():
            expected = self._log_probabilities(dense)
        found = self._log_probabilities(dense - target + given)
        scale = -torch.linalg.vecdot(expected.exp(), found.detach())
        return torch.stack([divergence_of(expected, found), scale])

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(S, V)` of what leaves the last block, each token a sequence of its own: heads know no positions."""
        return log_softmax(self._path.logits(hidden[:, None])[:, 0], -1)


def divergence_of(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) `(...)` in nats of log-probabilities `(..., V)`; `torch.kl_div` takes twice as long."""
    divergence: torch.Tensor = torch.linalg.vecdot(expected.exp(), expected - found)
    return divergence
