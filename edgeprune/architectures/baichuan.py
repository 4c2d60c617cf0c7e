"""Baichuan-7B and Baichuan2-7B: Llama blocks in a form of their own, read as the Llama that they are.

    W_pack     rows of q, of k, of v, hidden_size each            -> q_proj, k_proj, v_proj
    NormHead   (Baichuan2) rows of the head at unit length        -> a plain head, its rows normalised once

Nothing of the Python code beside the weights is run. Baichuan-13B has the same `model_type` and ALiBi in place of the
rotary embedding; it is refused.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from edgeprune_runtime.errors import EdgepruneError

BECOMES = "llama"
TOKENIZER = "sentencepiece"

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
REST = (
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "dtype",
    "use_cache",
)
ALIBI_SIZES = (5120, 40)
"""Hidden size and layers of Baichuan-13B and Baichuan2-13B. Their configs state `model_max_length` alone, but copies
of them were seen with `max_position_embeddings` as well."""

NORM_HEAD_CLASS = "BaichuanForCausalLM"  # the class of the first generation is BaiChuanForCausalLM
PACKED, HEAD = ".W_pack.weight", "lm_head.weight"
PARTS = ("q_proj", "k_proj", "v_proj")


def stock_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The raw config of the same model as a Llama, without what Baichuan's code never reads (such as rope settings).

    Raises:
        EdgepruneError: if it has ALiBi, or lacks a size.
    """
    shape = config.get("hidden_size"), config.get("num_hidden_layers")
    if shape == ALIBI_SIZES or config.get("max_position_embeddings") is None:
        raise EdgepruneError(
            f"{name} is a Baichuan with ALiBi (as the 13B models are), which Llama code cannot express; expected "
            "Baichuan-7B or Baichuan2-7B, whose rotary config states max_position_embeddings"
        )
    if missing := [key for key in SIZES if key not in config]:
        raise EdgepruneError(f"the config of {name} lacks {missing[0]}; fetch it again")
    kept = {key: config[key] for key in (*SIZES, *REST) if key in config}
    return kept | {"model_type": BECOMES, "num_key_value_heads": config["num_attention_heads"]}


def unpack(config: Mapping[str, Any], name: str) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Which tensors of the Llama are made of the stored tensor `name`, and how; they keep its dtype."""
    if name.endswith(PACKED):
        block = name.removesuffix(PACKED)
        return {f"{block}.{part}.weight": partial(_part, number) for number, part in enumerate(PARTS)}
    if name == HEAD and _has_norm_head(config):
        return {name: _unit_rows}
    return {name: _as_it_is}


def _has_norm_head(config: Mapping[str, Any]) -> bool:
    classes = config.get("architectures")
    return "z_loss_weight" in config or (isinstance(classes, list) and NORM_HEAD_CLASS in classes)


def _part(number: int, packed: torch.Tensor) -> torch.Tensor:
    part: torch.Tensor = packed.unflatten(0, (len(PARTS), -1))[number]
    return part


def _unit_rows(head: torch.Tensor) -> torch.Tensor:
    # in float32, whatever it is stored as: one rounding less than the original's
    return functional.normalize(head.float(), dim=1).to(head.dtype)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
