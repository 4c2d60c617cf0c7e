"""Which weights of a Linear become zero.

One file per method; to add one, imitate `wanda.py`:

1. `NEEDS` names the evidence the method reads: "inputs" (mean squares of the Linear's inputs), "gram" (all their second
   moments), or nothing;
2. `prune(evidence, pattern, side)` returns the Linear's weight `(out, in)` float32 with the zeros in it; it may change
   what stays. `side` is the dimension along which blocks lie;
3. `SIDES` (optional) names the side, by layout, of the Linears that make the channels of a gated MLP (gate, up), where
   that is not "in" in every layout;
4. `REFIT` (optional) is what `--refit` is if the user does not say; without it, "least-squares";
5. `notes(layout, scope, has_gate)` (optional) says in sentences where the method is not what its name promises.

What all methods share: the walk over the blocks, the refit of what stays, and the checks (`edgeprune.sparsify`).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Evidence:
    """What is known of one Linear with weight `(D, K)`.

    Attributes:
        weight: `(D, K)` float32.
        input_sq_mean: `(K,)` float32, mean square of each input over the calibration tokens.
        gram: `(K, K)` float32, mean over the tokens of the products of two inputs.
        channel_sq_mean: `(D,)` float32, mean square of the channel that each output is a factor of; only of the Linears
            that make the channels of a gated MLP.
    """

    weight: torch.Tensor
    input_sq_mean: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    channel_sq_mean: torch.Tensor | None = None
