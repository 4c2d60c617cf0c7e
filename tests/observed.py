"""What goes through a model or into a Linear, gathered by plain torch: for tests of what gathers it block by block."""

from typing import Any

import torch
from cuts import groups_of

from edgeprune.groups import blocks_name
from edgeprune.statistics import Moments


def block_outputs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each decoder block."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, output: seen.append(output if torch.is_tensor(output) else output[0])
        )
        for block in model.get_submodule(blocks_name(groups_of(model)))
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def moments(x: torch.Tensor, held_out: torch.Tensor | None = None) -> Moments:
    """Moments of inputs `(tokens, K)`, and of those kept aside."""
    if held_out is None:
        return Moments(x.T @ x / len(x), x.mean(0))
    both = torch.cat([x, held_out])
    return Moments(
        both.T @ both / len(both),
        both.mean(0),
        held_out_gram=held_out.T @ held_out / len(held_out),
        held_out_share=len(held_out) / len(both),
        held_out_mean=held_out.mean(0),
    )
