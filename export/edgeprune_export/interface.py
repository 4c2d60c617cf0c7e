"""The names and shapes that every graph of a bundle has at its border, whoever built it.

    input_ids, attention_mask, past_key_values.{i}.key/value   ->   logits, present.{i}.key/value

The dimension names are a contract with the consumers: transformers.js knows `batch_size` and takes every other symbol
as 0, lm-eval goes by the words "batch", "past" and "sequence", and onnxruntime-genai reads the KV heads and head_dim of
each layer off these shapes, where they must be integers.
"""

from collections.abc import Sequence

import onnx_ir as ir

from edgeprune.groups import LayerWidths

Shape = Sequence[int | str]

INPUT_IDS = ("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
ATTENTION_MASK = ("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
LOGITS_SHAPE = ("batch_size", "sequence_length")
PARTS = ("key", "value")

# Added to the scores of masked keys. Finite, because a row with nothing to attend to (padding before a sequence begins)
# would turn into NaN with -inf; large enough that exp() of any masked score is 0 in float32.
MASKED = -1e9
# Half of what float16 holds, so that a score may still be added to it; exp() of it is 0 too.
MASKED_HALF = -32752.0


def masked(dtype: ir.DataType) -> float:
    """What is added to the scores of masked keys of a float type."""
    return MASKED_HALF if dtype == ir.DataType.FLOAT16 else MASKED


def past_name(layer: int, part: str) -> str:
    """Name of a KV input."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Name of a KV output."""
    return f"present.{layer}.{part}"


def past_shape(widths: LayerWidths) -> Shape:
    """Shape of a layer's KV inputs."""
    return ("batch_size", widths.kv_heads, "past_sequence_length", widths.head_dim)


def present_shape(widths: LayerWidths) -> Shape:
    """Shape of a layer's KV outputs."""
    return ("batch_size", widths.kv_heads, "total_sequence_length", widths.head_dim)


def describe(value: ir.Value, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
    """The same value, with its name, type and shape set."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
