"""A tiny model as a GGUF file."""

from pathlib import Path

import gguf
import numpy as np

GGUF_SIZES = {
    "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8,
}  # fmt: skip


def save_gguf(file: Path, **sizes: int) -> Path:
    """A Llama of one block as GGUF; its metadata may say other sizes than its tensors have."""
    writer = gguf.GGUFWriter(str(file), "llama")
    for key, size in (GGUF_SIZES | sizes).items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"])
    writer.add_token_scores([0.0] * 8)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    shapes = {
        "token_embd": (8, 32), "output_norm": (32,), "output": (8, 32), "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.attn_norm": (32,),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64), "blk.0.ffn_norm": (32,),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
