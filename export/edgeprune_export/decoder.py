"""The declarative graph of Llama-like decoders: fused operators, widths per layer, weights streamed one at a time.

    input_ids ─ Gather ─ norm ─ layer 0 ─ … ─ layer n-1 ─ logits          (tied: Gather and logits share one tensor)

    layer:  x ─ MatMul q|k|v ─ [+ bias] ─ [q/k norm] ─ GroupQueryAttention ─ MatMul o ─ add and norm ─┐
            next ─ add and norm ─ MatMul down ─ SiLU(gate) * up ──────────────────────────────────────┘

Every width is read off the tensors (`weights.layer_widths`), so layers may differ; the heads and head_dim of each layer
stand as integers in the shapes of its KV inputs.

**Padding.** The graph takes a batch padded on either side, or on both, and needs no `position_ids` input. Keys are
addressed by slot (column of `attention_mask`), and masked slots are shut out by an additive bias, made once for all
layers. A token's rotary position is its slot, minus the masked slots that lie between its sequence's first token and
itself: leading padding shifts a whole sequence, which rotary embeddings do not see, and the gap that right padding
leaves before the decoded tokens is closed. Only a mask with holes *inside one prompt* is not taken: in a prompt the
operator counts slots.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from edgeprune.configs import quiet_global_reads
from edgeprune.groups import LayerWidths
from edgeprune_export import interface
from edgeprune_export.external_data import ExternalData
from edgeprune_export.weights import Array, Weights, layer_widths
from edgeprune_runtime.errors import EdgepruneError

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"

# GroupQueryAttention rotates heads of this granularity only; others are rotated by an operator before it.
ROTARY_ALIGNMENT = 16

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

Attributes = Mapping[str, int | float | str | Sequence[int]]


@dataclass(frozen=True)
class _Rope:
    """Rotary tables `(max_position, head_dim / 2)` float32, as the operator reads them."""

    cos: Array
    sin: Array


@dataclass(frozen=True)
class _Shared:
    """Values made once and read by every layer."""

    last_slot: ir.Value
    total_tokens: ir.Value
    mask_bias: ir.Value
    window_bias: ir.Value | None
    positions: ir.Value
    cos: ir.Value
    sin: ir.Value


def build(
    config: PreTrainedConfig,
    weights: Weights,
    data: ExternalData,
    on_layer: Callable[[float], None] = lambda share: None,
) -> ir.Model:
    """The graph of a checkpoint; its weights are appended to `data` on the way, and `on_layer` hears the share done.

    Raises:
        EdgepruneError: if the model has something these operators cannot express.
    """
    return _Builder(config, weights, data).build(on_layer)


class _Builder:
    def __init__(self, config: PreTrainedConfig, weights: Weights, data: ExternalData) -> None:
        if config.hidden_act not in ("silu", "swish"):
            raise EdgepruneError(
                f"the decoder graph has no activation {config.hidden_act!r}; expected silu; use --graph-source traced"
            )
        self._config = config
        self._weights = weights
        self._data = data
        self._widths = layer_widths(config, weights)
        self._graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET, MICROSOFT: 1}, name="decoder")
        self._tape = Tape(self._graph)

    def build(self, on_layer: Callable[[float], None]) -> ir.Model:
        config = self._config
        ids, mask = self._input(*interface.INPUT_IDS), self._input(*interface.ATTENTION_MASK)
        shared = self._shared(ids, mask)
        embedding = self._initializer("model.embed_tokens.weight", self._weights.read("model.embed_tokens.weight"))
        residual = self._op("Gather", [embedding, ids], "model.embed_tokens")
        normed = self._op(
            "SimplifiedLayerNormalization",
            [residual, self._weight("model.layers.0.input_layernorm.weight")],
            "model.layers.0.input_layernorm",
            {"axis": -1, "epsilon": float(config.rms_norm_eps)},
        )
        presents: list[ir.Value] = []
        for layer, widths in enumerate(self._widths):
            prefix = f"model.layers.{layer}"
            attention, present = self._attention(layer, widths, normed, shared)
            presents += present
            residual, normed = self._add_and_norm(
                residual,
                attention,
                bias=f"{prefix}.self_attn.o_proj.bias",
                norm=f"{prefix}.post_attention_layernorm",
            )
            is_last = layer == len(self._widths) - 1
            residual, normed = self._add_and_norm(
                residual,
                self._mlp(f"{prefix}.mlp", normed),
                bias=f"{prefix}.mlp.down_proj.bias",
                norm="model.norm" if is_last else f"model.layers.{layer + 1}.input_layernorm",
            )
            on_layer((layer + 1) / len(self._widths))
        logits = self._lm_head(normed, embedding)
        shape = (*interface.LOGITS_SHAPE, config.vocab_size)
        self._graph.outputs.append(interface.describe(logits, "logits", ir.DataType.FLOAT, shape))
        self._graph.outputs.extend(presents)
        return ir.Model(self._graph, ir_version=IR_VERSION, producer_name="edgeprune")

    def _shared(self, ids: ir.Value, mask: ir.Value) -> _Shared:
        """What all layers read: where keys end, which are masked, and each token's rotary position."""
        op, const = self._op, self._constant
        batch = op("Shape", [mask], "mask/batch", {"start": 0, "end": 1})
        total = op("Shape", [mask], "mask/total", {"start": 1, "end": 2})
        tokens = op("Shape", [ids], "ids/tokens", {"start": 1, "end": 2})
        zero, one = const("zero", np.array([0], np.int64)), const("one", np.array([1], np.int64))

        total_i32 = op("Cast", [total], "mask/total_i32", {"to": ir.DataType.INT32.value})
        total_tokens = op("Squeeze", [total_i32], "mask/total_tokens")
        last = op("Sub", [total_i32, const("one_i32", np.array([1], np.int32))], "mask/last")
        last_slot = op("Expand", [last, batch], "mask/last_slot")

        # Leading padding counts as positions, later padding does not.
        columns = const("columns", np.array(1, np.int64))
        before_first = op("Equal", [op("CumSum", [mask, columns], "positions/seen"), zero], "positions/before_first")
        counted = op("Where", [before_first, one, mask], "positions/counted")
        slots = op("Sub", [op("CumSum", [counted, columns], "positions/count"), one], "positions/all")
        start = op("Neg", [tokens], "positions/start")
        end = const("end", np.array([np.iinfo(np.int64).max], np.int64))
        positions = op("Slice", [slots, start, end, one], "positions")

        masked = const("masked", np.array(interface.MASKED, np.float32))
        present = op("Cast", [mask], "mask/present", {"to": ir.DataType.FLOAT.value})
        absent = op("Sub", [const("one_f32", np.array(1, np.float32)), present], "mask/absent")
        penalty = op("Mul", [absent, masked], "mask/penalty")
        rows = op("Unsqueeze", [penalty, const("rows", np.array([1, 2], np.int64))], "mask/rows")
        bias_shape = op("Concat", [batch, one, tokens, total], "mask/bias_shape", {"axis": 0})
        mask_bias = op("Expand", [rows, bias_shape], "mask/bias")
        window = getattr(self._config, "sliding_window", None)
        window_bias = None
        if any(_slides(self._config, layer) for layer in range(len(self._widths))):
            # The operator's own window counts slots, padding included; tokens are what the model counts.
            to_query, to_key = (
                const("to_query", np.array([1, 3], np.int64)),
                const("to_key", np.array([1, 2], np.int64)),
            )
            queries = op("Unsqueeze", [positions, to_query], "window/queries")
            keys = op("Unsqueeze", [slots, to_key], "window/keys")
            distance = op("Sub", [queries, keys], "window/distance")
            is_outside = op("GreaterOrEqual", [distance, const("window", np.array(window, np.int64))], "window/outside")
            window_bias = op("Where", [is_outside, masked, mask_bias], "window/bias")

        rope = rotary_tables(self._config, self._widths[0].head_dim)
        return _Shared(
            last_slot=last_slot,
            total_tokens=total_tokens,
            mask_bias=mask_bias,
            window_bias=window_bias,
            positions=positions,
            cos=self._initializer("rotary.cos", rope.cos),
            sin=self._initializer("rotary.sin", rope.sin),
        )

    def _attention(
        self, layer: int, widths: LayerWidths, x: ir.Value, shared: _Shared
    ) -> tuple[ir.Value, list[ir.Value]]:
        prefix = f"model.layers.{layer}.self_attn"
        pasts = [
            self._input(interface.past_name(layer, part), ir.DataType.FLOAT, interface.past_shape(widths))
            for part in interface.PARTS
        ]
        rotates = _uses_rope(self._config, layer)
        rotates_inside = rotates and widths.head_dim % ROTARY_ALIGNMENT == 0
        qkv = self._qkv(prefix, widths, x, shared if rotates and not rotates_inside else None)
        output, *presents = self._tape.op_multi_out(
            "GroupQueryAttention",
            [
                *qkv,
                *pasts,
                shared.last_slot,
                shared.total_tokens,
                shared.cos if rotates_inside else None,
                shared.sin if rotates_inside else None,
                shared.positions if rotates_inside else None,
                shared.window_bias if _slides(self._config, layer) else shared.mask_bias,
            ],
            {
                "num_heads": widths.heads,
                "kv_num_heads": widths.kv_heads,
                "scale": widths.head_dim**-0.5,
                "do_rotary": int(rotates_inside),
                "rotary_interleaved": 0,
            },
            num_outputs=3,
            domain=MICROSOFT,
            name=f"{prefix}/GroupQueryAttention",
        )
        output.name = f"{prefix}/output"
        for value, part in zip(presents, interface.PARTS, strict=True):
            name = interface.present_name(layer, part)
            interface.describe(value, name, ir.DataType.FLOAT, interface.present_shape(widths))
        return self._matmul(output, f"{prefix}.o_proj"), presents

    def _qkv(self, prefix: str, widths: LayerWidths, x: ir.Value, rotary: _Shared | None) -> Sequence[ir.Value | None]:
        """Query, key and value from one product; packed in one value where nothing must be done to them apart."""
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        packed = self._matmul(x, *names, packed_name=f"{prefix}.qkv_proj")
        if f"{names[0]}.bias" in self._weights:
            packed = self._add_bias(packed, *names, packed_name=f"{prefix}.qkv_proj")
        has_norm = f"{prefix}.q_norm.weight" in self._weights
        if not has_norm and rotary is None:
            return packed, None, None
        heads = {"q": widths.heads, "k": widths.kv_heads, "v": widths.kv_heads}
        sizes = np.array([count * widths.head_dim for count in heads.values()], np.int64)
        values = self._tape.op_multi_out(
            "Split",
            [packed, self._constant(f"{prefix}.qkv_sizes", sizes)],
            {"axis": -1},
            num_outputs=3,
            name=f"{prefix}/split",
        )
        apart = dict(zip("qkv", values, strict=True))
        for part in "qk":
            if has_norm:
                apart[part] = self._head_norm(f"{prefix}.{part}_norm", apart[part], widths.head_dim)
            if rotary is not None:
                apart[part] = self._rotate(f"{prefix}.{part}_rotary", apart[part], heads[part], rotary)
        return list(apart.values())

    def _rotate(self, name: str, x: ir.Value, heads: int, rotary: _Shared) -> ir.Value:
        inputs = [x, rotary.positions, rotary.cos, rotary.sin]
        return self._op("RotaryEmbedding", inputs, name, {"num_heads": heads, "interleaved": 0}, domain=MICROSOFT)

    def _head_norm(self, name: str, x: ir.Value, head_dim: int) -> ir.Value:
        by_head = self._constant("by_head", np.array([0, 0, -1, head_dim], np.int64))
        joined = self._constant("joined", np.array([0, 0, -1], np.int64))
        heads = self._op("Reshape", [x, by_head], f"{name}/by_head")
        normed = self._op(
            "SimplifiedLayerNormalization",
            [heads, self._weight(f"{name}.weight")],
            name,
            {"axis": -1, "epsilon": float(self._config.rms_norm_eps)},
        )
        return self._op("Reshape", [normed, joined], f"{name}/joined")

    def _mlp(self, prefix: str, x: ir.Value) -> ir.Value:
        gate, up = (self._linear(x, f"{prefix}.{part}_proj") for part in ("gate", "up"))
        gated = self._op("Mul", [gate, self._op("Sigmoid", [gate], f"{prefix}/sigmoid")], f"{prefix}/silu")
        return self._matmul(self._op("Mul", [gated, up], f"{prefix}/product"), f"{prefix}.down_proj")

    def _add_and_norm(self, residual: ir.Value, x: ir.Value, *, bias: str, norm: str) -> tuple[ir.Value, ir.Value]:
        """The sum `residual + x [+ bias]`, and its RMS norm."""
        inputs = [x, residual, self._weight(f"{norm}.weight")]
        if bias in self._weights:
            inputs.append(self._weight(bias))
        outputs = self._tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            inputs,
            {"epsilon": float(self._config.rms_norm_eps)},
            num_outputs=4,
            domain=MICROSOFT,
            name=norm,
        )
        outputs[1].name = outputs[2].name = ""  # mean and inverse deviation, not wanted
        outputs[0].name, outputs[3].name = f"{norm}/output", f"{norm}/residual"
        return outputs[3], outputs[0]

    def _lm_head(self, x: ir.Value, embedding: ir.Value) -> ir.Value:
        if not self._config.tie_word_embeddings:
            return self._linear(x, "lm_head")
        # Listed among the graph's inputs, an initializer counts as one that a caller may override (sessions do not show
        # it as an input). So ONNX Runtime uses the table where it lies, mapped from the file, for both readers. As a
        # constant it would be packed into a second copy for the product: as fast, and a whole table more of memory.
        self._graph.inputs.append(embedding)
        return self._op("FusedMatMul", [x, embedding], "lm_head", {"transB": 1}, domain=MICROSOFT)

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        product = self._matmul(x, name)
        return self._add_bias(product, name) if f"{name}.bias" in self._weights else product

    def _matmul(self, x: ir.Value, *names: str, packed_name: str | None = None) -> ir.Value:
        """`x` times the transposed weights of one or more Linears, joined along their outputs."""
        name = packed_name or names[0]
        weight = self._weights.read_rows([f"{part}.weight" for part in names])
        return self._op("MatMul", [x, self._initializer(f"{name}.weight", weight.T)], f"{name}/MatMul")

    def _add_bias(self, x: ir.Value, *names: str, packed_name: str | None = None) -> ir.Value:
        name = packed_name or names[0]
        bias = self._weights.read_rows([f"{part}.bias" for part in names])
        return self._op("Add", [x, self._initializer(f"{name}.bias", bias)], f"{name}/Add")

    def _weight(self, name: str) -> ir.Value:
        return self._initializer(name, self._weights.read(name))

    def _initializer(self, name: str, array: Array) -> ir.Value:
        return self._tape.initializer(self._data.add(name, array))

    def _constant(self, name: str, array: np.ndarray[Any, np.dtype[Any]]) -> ir.Value:
        """A small constant that stays inside the graph; one per name."""
        found = self._graph.initializers.get(name)
        return found if found is not None else self._tape.initializer(ir.tensor(array, name=name))

    def _input(self, name: str, dtype: ir.DataType, shape: interface.Shape) -> ir.Value:
        value = interface.describe(ir.Value(), name, dtype, shape)
        self._graph.inputs.append(value)
        return value

    def _op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Attributes | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        value = self._tape.op(kind, inputs, attributes, domain=domain, name=name)
        value.name = f"{name}/output"
        return value


def _uses_rope(config: PreTrainedConfig, layer: int) -> bool:
    # SmolLM3 lists one flag per layer, under a name that says the opposite: 1 means that the layer rotates.
    flags = getattr(config, "no_rope_layers", None)
    return bool(flags[layer]) if flags else True


def _slides(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer sees the last `config.sliding_window` tokens only."""
    if getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True):
        return False
    kinds = getattr(config, "layer_types", None)
    return kinds is None or bool(kinds[layer] == "sliding_attention")


def rotary_tables(config: PreTrainedConfig, head_dim: int) -> _Rope:
    """Cosines and sines of every position, computed by the model's own rotary module.

    Raises:
        EdgepruneError: if the frequencies depend on the running length, or do not span the whole head.
    """
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _STATIC_ROPE:
        raise EdgepruneError(
            f"rope_type {rope_type!r} changes its frequencies with the running length, which a table cannot hold; "
            f"expected one of {', '.join(_STATIC_ROPE)}"
        )
    rotary = _rotary_module(config, head_dim)
    positions = torch.arange(config.max_position_embeddings)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    if cos.shape[-1] != head_dim:
        raise EdgepruneError(
            f"the rotary embedding spans {cos.shape[-1]} of {head_dim} channels of a head; expected all; "
            "use --graph-source traced"
        )
    half = head_dim // 2  # the module repeats the same angles for the second half
    return _Rope(*(table[0, :, :half].to(torch.float32).contiguous().numpy() for table in (cos, sin)))


def _rotary_module(config: PreTrainedConfig, head_dim: int) -> torch.nn.Module:
    # The module reads head_dim alone, but a config with per-layer widths refuses to answer questions on heads, and
    # stock configs refuse head counts that do not divide the hidden size. So ask with one head of the right size.
    with quiet_global_reads():
        data = config.to_dict()
    data |= {"head_dim": head_dim, "num_attention_heads": 1, "num_key_value_heads": 1}
    plain = CONFIG_MAPPING[config.model_type].from_dict({k: v for k, v in data.items() if k != "per_layer_config"})
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(plain)
    module: torch.nn.Module = type(skeleton.model.rotary_emb)(plain)
    return module
