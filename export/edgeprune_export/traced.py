"""The graph of any prunable model, traced from its own torch code by `torch.onnx.export`, in standard operators.

Slower to make than the declarative graph, and independent of it: what both compute alike is right. The wrapper makes
the KV cache and the attention mask explicit, so that the border is the same and padding on either side is taken; the
attention of a layer comes out as one operator, whatever the model's own code does (`routing`).

In the plain form no operator is younger than opset 18, and attention, norms and rotary embeddings are products and
sums: for execution providers that fall behind the newest opsets or take no operator that stands for a whole attention.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from inspect import signature

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from edgeprune.groups import LayerWidths
from edgeprune_export import interface
from edgeprune_export.external_data import ExternalData
from edgeprune_export.positions import check_rope, constant_rope
from edgeprune_export.reference import cache_tensors
from edgeprune_export.routing import Call, attend, attend_plainly, routed

OPSET = 23  # the first with Attention and RotaryEmbedding
PLAIN_OPSET = 18  # what torch's operators are written in, without conversion

SMALL_BYTES = 1024  # smaller initializers (shapes, scalars) stay inside the graph

# Sizes of the example that is traced: unlike each other and unlike 0 and 1, which torch.export takes for constants.
_BATCH, _TOKENS, _PAST = 2, 3, 5


def build(model: PreTrainedModel, widths: list[LayerWidths], data: ExternalData, *, is_plain: bool = False) -> ir.Model:
    """The traced graph of a float32 model in eval mode; its weights are appended to `data`."""
    pasts = [torch.zeros(_BATCH, width.kv_heads, _PAST, width.head_dim) for width in widths for _ in interface.PARTS]
    ids = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    past_dims = {0: "batch_size", 2: "past_sequence_length"}
    check_rope(model.config)
    call = Call()
    with _quiet(), _no_cache(), constant_rope(model), routed(model, call, attend_plainly if is_plain else attend):
        program = torch.onnx.export(
            _ExplicitCache(model, call).eval(),
            (ids, mask, *pasts),
            dynamo=True,
            opset_version=PLAIN_OPSET if is_plain else OPSET,
            dynamic_shapes=(
                {0: "batch_size", 1: "sequence_length"},
                {0: "batch_size", 1: "total_sequence_length"},
                tuple(past_dims for _ in pasts),
            ),
            # ONNX Runtime optimises the graph when it loads it; doing it here as well takes longer than all the rest.
            optimize=False,
            verbose=False,
        )
    assert program is not None, "dynamo=True returns a program"
    graph_model = program.model
    graph_model.producer_name = "edgeprune"
    # The exporter notes each node's Python stack, with the paths of this machine; nothing of it belongs in a bundle.
    ClearMetadataAndDocStringPass()(graph_model)
    _name_border(graph_model.graph, widths, model.config.vocab_size)
    _move_weights(graph_model.graph, data)
    return graph_model


class _ExplicitCache(nn.Module):
    """A causal model whose cache and mask are tensors that go in and come out."""

    def __init__(self, model: PreTrainedModel, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.takes_positions = "position_ids" in signature(model.forward).parameters

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *pasts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(pasts) // 2):
            cache.update(pasts[2 * layer], pasts[2 * layer + 1], layer)
        self.call.begin(mask, ids.shape[1])
        output = self.model(
            input_ids=ids,
            attention_mask=_masks(self.model.config, self.call),
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": self.call.query_positions} if self.takes_positions else {}),
        )
        return (output.logits, *cache_tensors(cache))


def _masks(config: PreTrainedConfig, call: Call) -> torch.Tensor | dict[str, torch.Tensor]:
    """One additive mask, or one per kind of layer where the model tells kinds apart."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if getattr(config, "layer_types", None) is None:
        return call.bias(window)
    return {"full_attention": call.bias(None), "sliding_attention": call.bias(window)}


def _no_cache() -> AbstractContextManager[None]:
    """Infer shapes anew each time: with symbolic ones, finding them in torch's cache takes longer than inferring."""
    # An attribute of torch that imports its compiler; whoever exports nothing shall not wait for that.
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return patched


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks to its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _name_border(graph: ir.Graph, widths: list[LayerWidths], vocab_size: int) -> None:
    ids, mask, *pasts = graph.inputs
    logits, *presents = graph.outputs
    interface.describe(ids, *interface.INPUT_IDS)
    interface.describe(mask, *interface.ATTENTION_MASK)
    interface.describe(logits, "logits", ir.DataType.FLOAT, (*interface.LOGITS_SHAPE, vocab_size))
    for index, (past, present) in enumerate(zip(pasts, presents, strict=True)):
        layer, part = divmod(index, 2)
        name, width = interface.PARTS[part], widths[layer]
        interface.describe(past, interface.past_name(layer, name), ir.DataType.FLOAT, interface.past_shape(width))
        interface.describe(
            present, interface.present_name(layer, name), ir.DataType.FLOAT, interface.present_shape(width)
        )


def _move_weights(graph: ir.Graph, data: ExternalData) -> None:
    """Write every initializer that is used to the data file; tied ones become one."""
    first_uses: dict[int, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
            continue
        assert value.const_value is not None, f"the exporter left {name} without a value"
        array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = value.const_value.numpy()
        address = array.__array_interface__["data"][0]
        if array.nbytes >= SMALL_BYTES and address in first_uses:
            ir.convenience.replace_all_uses_with(value, first_uses[address])
            del graph.initializers[name]
            continue
        if array.nbytes >= SMALL_BYTES:
            first_uses[address] = value
            value.const_value = data.add(name, array)
