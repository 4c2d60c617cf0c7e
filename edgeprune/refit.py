"""Closed-form refit: the Linears that read units (o_proj, down_proj) learn to do without the ones that went.

For inputs X `(tokens, K)` of weight W `(D, K)`, with H = X^T X / tokens and kept inputs S, the kept columns become

    W_S* = argmin_V ||X W^T - X_S V^T||^2 / tokens + lam ||V - W_S||^2
         = (W H[:, S] + lam W_S) (H[S, S] + lam I)^-1

The ridge pulls toward the original weights, so a large lam changes nothing and a singular H does no harm. With lam = 0
and a regular H it is the optimal brain surgeon's update of all kept weights at once.
"""

import torch

from edgeprune.statistics import Moments
from edgeprune_runtime.errors import EdgepruneError

DAMPING = 0.01
"""lam as a share of the mean diagonal of H: what SparseGPT (arXiv 2301.00774) and ZipLM use."""


def refit(weight: torch.Tensor, moments: Moments, kept_columns: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Weight `(D, len(kept_columns))` float32 that best reproduces the full Linear on the calibration inputs.

    Args:
        weight: the full weight `(D, K)`.
        moments: moments of its K inputs.
        kept_columns: sorted int64 indices of the inputs that stay.
        damping: ridge as a share of the mean diagonal of H.

    Raises:
        EdgepruneError: if the system cannot be solved (the inputs are not finite).
    """
    gram = moments.gram.double()
    lam = damping * float(gram.diagonal().mean())
    kept_gram = gram[kept_columns][:, kept_columns]
    kept_gram.diagonal().add_(lam if lam > 0 else 1.0)
    original = weight[:, kept_columns].double()
    target = weight.double() @ gram[:, kept_columns] + (lam if lam > 0 else 1.0) * original
    factor, failed = torch.linalg.cholesky_ex(kept_gram)
    if failed or not torch.isfinite(factor).all():
        raise EdgepruneError(
            f"the Gram matrix of {kept_gram.shape[0]} inputs is singular even with damping {damping}; "
            "expected finite calibration activations: give more text or a larger damping"
        )
    return torch.cholesky_solve(target.T, factor).T.to(weight.dtype)


def output_error(weight: torch.Tensor, moments: Moments, kept_columns: torch.Tensor, fitted: torch.Tensor) -> float:
    """Share of the Linear's output energy on the calibration inputs that the cut and refitted weight misses."""
    change = weight.clone().double()
    change[:, kept_columns] -= fitted.double()
    gram = moments.gram.double()
    lost = torch.einsum("dk,kl,dl->", change, gram, change)
    energy = torch.einsum("dk,kl,dl->", weight.double(), gram, weight.double())
    return float(lost / energy) if energy > 0 else 0.0
