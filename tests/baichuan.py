"""Tiny Baichuan checkpoints in Baichuan's own form, and its maths written down once more, for the tests."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import import_protobuf

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE = 2
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
WORDS = (SPACE + "t", "he", SPACE + "the", "th", "in", "er", "an", SPACE + SPACE, "中国")
BASE_FREQUENCY = 10000.0


def sizes(**changes: Any) -> dict[str, Any]:
    """A config.json as Baichuan-7B has it."""
    return {
        "architectures": ["BaiChuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaiChuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
        },
        "model_type": "baichuan",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "hidden_act": "silu",
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    } | changes


BAICHUAN2 = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "z_loss_weight": 0,
    "model_max_length": 160,
}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under Baichuan's names, large enough that every head and channel matters."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(hidden, generator=generator)

    found = {"model.embed_tokens.weight": matrix(words, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        found |= {
            f"{block}self_attn.W_pack.weight": matrix(3 * hidden, hidden),
            f"{block}self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{block}self_attn.rotary_emb.inv_freq": _frequencies(hidden // config["num_attention_heads"]),
            f"{block}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{block}mlp.up_proj.weight": matrix(inner, hidden),
            f"{block}mlp.down_proj.weight": matrix(hidden, inner),
            f"{block}input_layernorm.weight": norm(),
            f"{block}post_attention_layernorm.weight": norm(),
        }
    return found | {"model.norm.weight": norm(), "lm_head.weight": 3 * matrix(words, hidden)}


def save(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], form: str = "safetensors") -> Path:
    """Write a checkpoint with code beside it that must never run; `form` is safetensors, shards or bin."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("modeling_baichuan", "configuration_baichuan", "tokenization_baichuan"):
        (folder / f"{module}.py").write_text("raise AssertionError('foreign code was run')\n")
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "tokenizer_class": "BaiChuanTokenizer",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "model_max_length": 160,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(sentencepiece())
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "shards":
        names = sorted(weights)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def sentencepiece(*, dummy_prefix: bool = False, byte_fallback: bool = True, **changes: Any) -> bytes:
    """A SentencePiece BPE model of 320 pieces: control symbols, bytes, letters, a few merges."""
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = changes.pop("model_type", BPE)
    proto.trainer_spec.byte_fallback = byte_fallback
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzTA.,!?0123", "中", "国"]
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    pieces += [(piece, NORMAL) for piece in (*WORDS, *letters)]
    pieces += [(f"<reserved_{number}>", changes.pop("reserved", CONTROL)) for number in range(320 - len(pieces))]
    for number, (piece, kind) in enumerate(pieces):
        added = proto.pieces.add()
        added.piece, added.type = piece, kind
        added.score = -float(number) if kind == NORMAL else 0.0
    assert not changes
    return bytes(proto.SerializeToString())


@torch.no_grad()
def logits(config: dict[str, Any], weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits `(B, T, V)` of Baichuan: RMS norm, packed attention with rotary embedding, SwiGLU, (norm) head."""
    heads = config["num_attention_heads"]
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        normed = _rms(hidden, weights[f"{block}input_layernorm.weight"])
        packed = normed @ weights[f"{block}self_attn.W_pack.weight"].T
        hidden = hidden + _attention(packed, heads) @ weights[f"{block}self_attn.o_proj.weight"].T
        normed = _rms(hidden, weights[f"{block}post_attention_layernorm.weight"])
        gate = normed @ weights[f"{block}mlp.gate_proj.weight"].T
        up = normed @ weights[f"{block}mlp.up_proj.weight"].T
        hidden = hidden + (gate * gate.sigmoid() * up) @ weights[f"{block}mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    if "z_loss_weight" in config:
        head = head / head.square().sum(1, keepdim=True).sqrt()
    return _rms(hidden, weights["model.norm.weight"]) @ head.T


def _attention(packed: torch.Tensor, heads: int) -> torch.Tensor:
    batch, length, width = packed.shape
    size = width // 3 // heads
    q, k, v = packed.split(width // 3, dim=-1)
    out = torch.zeros(batch, length, width // 3)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        q_head, k_head = _rotated(q[..., columns]), _rotated(k[..., columns])
        scores = q_head @ k_head.transpose(1, 2) / math.sqrt(size)
        scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        out[..., columns] = scores.softmax(-1) @ v[..., columns]
    return out


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + size / 2) turned by position * frequency_i."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * _frequencies(x.shape[-1])
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def _frequencies(size: int) -> torch.Tensor:
    return BASE_FREQUENCY ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
