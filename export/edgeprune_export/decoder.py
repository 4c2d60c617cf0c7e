"""The declarative graph of Llama-like decoders: fused operators, widths per layer, weights streamed one at a time.

    input_ids ─ Gather ─ norm ─ layer 0 ─ … ─ layer n-1 ─ logits          (tied: Gather and logits share one tensor)

    layer:  x ─ MatMul q|k|v ─ [+ bias] ─ [q/k norm] ─ GroupQueryAttention ─ MatMul o ─ add and norm ─┐
            next ─ add and norm ─ MatMul down ─ act(gate) * up ───────────────────────────────────────┘

Every width is that of the checkpoint's own tensors, so layers may differ; the heads and head_dim of each layer stand as
integers in the shapes of its KV inputs. What sets a family apart is in `_Traits`.

**Padding.** The graph takes a batch padded on either side, or on both, and needs no `position_ids` input. Keys are
addressed by slot (column of `attention_mask`), and masked slots are shut out by an additive bias, made once for all
layers. A token's rotary position is its slot, minus the masked slots that lie between its sequence's first token and
itself: leading padding shifts a whole sequence, which rotary embeddings do not see, and the gap that right padding
leaves before the decoded tokens is closed. Only a mask with holes *inside one prompt* is not taken: in a prompt the
operator counts slots.

**Rotary tables.** The operators read cosines and sines from a table of all positions. Its file would be as large as
`context_tokens` is long, so the graph has frequencies alone and says how the table comes of them; as all of that is
constant, ONNX Runtime computes it once, when it opens the session.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from edgeprune.groups import LayerWidths
from edgeprune_export import interface
from edgeprune_export.external_data import ExternalData
from edgeprune_export.graph_writer import MICROSOFT, Attributes, GraphWriter, Table
from edgeprune_export.positions import Rotation, context_tokens, layer_kind, rotations, uses_rope, window_of
from edgeprune_export.quantize import RoundedWeights
from edgeprune_export.weights import Array
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.session import LOGITS_TO_KEEP

IR_VERSION = 10
FIRST_NORM = "model.layers.0.input_layernorm"

# GroupQueryAttention rotates stretches of this granularity only; others are rotated by an operator before it.
ROTARY_ALIGNMENT = 16

# transformers' names of an activation -> the operator; None is SiLU, x * sigmoid(x), which ONNX spells in two.
_ACTIVATIONS: dict[str, tuple[str, Attributes] | None] = {
    "silu": None,
    "swish": None,
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
}


@dataclass(frozen=True)
class _Traits:
    """What sets a family apart from Llama, asked of the model's own code, config and tensor names."""

    activation: tuple[str, Attributes] | None
    norm_offset: float
    """Gemma stores the weights of its norms minus one."""
    embedding_scale: float
    """Gemma multiplies embeddings by sqrt(hidden_size), but not the tied head."""
    has_inner_norms: bool
    """Gemma norms what attention and MLP give before it is added, not only what they take."""
    attention_scale: float | None
    """Gemma divides scores by the square root of a size of its own; None: of head_dim."""
    score_softcap: float
    """Gemma 2 squeezes scores into +-this by tanh; 0: it does not."""
    logit_softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "_Traits":
        """The traits of a model, which may lie on the meta device.

        Raises:
            EdgepruneError: if it has an activation for which there is no operator.
        """
        config: Any = model.config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in _ACTIVATIONS:
            raise EdgepruneError(
                f"the decoder graph has no activation {activation!r}; expected one of {', '.join(_ACTIVATIONS)}; "
                "use --graph-source traced"
            )
        body: Any = model.base_model
        scalar = getattr(config, "query_pre_attn_scalar", None)
        return cls(
            activation=_ACTIVATIONS[activation],
            norm_offset=_norm_offset(body.norm),
            embedding_scale=getattr(body.embed_tokens, "scalar_embed_scale", 1.0),
            has_inner_norms=hasattr(body.layers[0], "pre_feedforward_layernorm"),
            attention_scale=None if scalar is None else scalar**-0.5,
            score_softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
        )


@dataclass(frozen=True)
class _Shared:
    """Values made once and read by every layer."""

    last_slot: ir.Value
    total_tokens: ir.Value
    mask_bias: ir.Value
    window_bias: ir.Value | None
    positions: ir.Value
    tables: Mapping[str | None, "_Rotary"]


@dataclass(frozen=True)
class _Rotary:
    """Rotary tables in the graph, and how many channels of a head they rotate."""

    cos: ir.Value
    sin: ir.Value
    rotary_dim: int


def build(
    rounded: RoundedWeights, data: ExternalData, on_layer: Callable[[float], None] = lambda share: None
) -> ir.Model:
    """The graph of a checkpoint's weights in a precision; they are appended to `data`, one at a time.

    `on_layer` hears the share that is done.

    Raises:
        EdgepruneError: if the model has something these operators cannot express.
    """
    return _Builder(rounded, data).build(on_layer)


def boundaries(model: ir.Model, layers: int) -> list[tuple[str, ...]]:
    """What flows between the blocks of a graph that `build` made: values in front of each, and behind the last.

    They are the sum of what came before, and the same normed; behind the last block only this is read.
    """
    first_norm = model.graph.node(FIRST_NORM)
    residual = first_norm.inputs[0]
    assert residual is not None, "a norm has something to norm"
    found: list[tuple[str, ...]] = [(residual.name or "", f"{FIRST_NORM}/output")]
    for layer in range(1, layers):
        norm = f"model.layers.{layer}.input_layernorm"
        found.append((f"{norm}/residual", f"{norm}/output"))
    return [*found, ("model.norm/output",)]


class _Builder(GraphWriter):
    def __init__(self, rounded: RoundedWeights, data: ExternalData) -> None:
        super().__init__(rounded, data)
        self._config: Any = self.weights.config
        self._traits = _Traits.of(self.weights.model)
        self._widths = self.weights.layer_widths()

    def build(self, on_layer: Callable[[float], None]) -> ir.Model:
        ids, mask = self.input(*interface.INPUT_IDS), self.input(*interface.ATTENTION_MASK)
        shared = self._shared(ids, mask)
        residual, embedding = self.lookup(ids, "model.embed_tokens")
        if self._traits.embedding_scale != 1.0:
            scale = self.scalar("embedding_scale", self._traits.embedding_scale)
            residual = self.op("Mul", [residual, scale], "model.embed_tokens/scaled")
        normed = self._norm(residual, FIRST_NORM)
        presents: list[ir.Value] = []
        for layer, widths in enumerate(self._widths):
            prefix = f"model.layers.{layer}"
            attention, present = self._attention(layer, widths, normed, shared)
            presents += present
            middle_norm, last_norm = f"{prefix}.post_attention_layernorm", None
            if self._traits.has_inner_norms:
                middle_norm, last_norm = f"{prefix}.pre_feedforward_layernorm", f"{prefix}.post_feedforward_layernorm"
            residual, normed = self._join(
                residual,
                attention,
                linear=f"{prefix}.self_attn.o_proj",
                inner_norm=f"{prefix}.post_attention_layernorm" if last_norm else None,
                next_norm=middle_norm,
            )
            is_last = layer == len(self._widths) - 1
            residual, normed = self._join(
                residual,
                self._gated(f"{prefix}.mlp", widths, normed),
                linear=f"{prefix}.mlp.down_proj",
                inner_norm=last_norm,
                next_norm="model.norm" if is_last else f"model.layers.{layer + 1}.input_layernorm",
            )
            on_layer((layer + 1) / len(self._widths))
        logits = self._lm_head(self._kept(normed), embedding)
        if self.dtype != ir.DataType.FLOAT:
            logits = self.op("Cast", [logits], "logits/float", {"to": ir.DataType.FLOAT.value})
        shape = (*interface.LOGITS_SHAPE, self._config.vocab_size)
        self.graph.outputs.append(interface.describe(logits, "logits", ir.DataType.FLOAT, shape))
        self.graph.outputs.extend(presents)
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="edgeprune")

    def _shared(self, ids: ir.Value, mask: ir.Value) -> _Shared:
        """What all layers read: where keys end, which are masked, and each token's rotary position."""
        op, const = self.op, self.constant
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

        masked = self.scalar("masked", interface.masked(self.dtype))
        present = op("Cast", [mask], "mask/present", {"to": self.dtype.value})
        absent = op("Sub", [self.scalar("one_float", 1), present], "mask/absent")
        penalty = op("Mul", [absent, masked], "mask/penalty")
        rows = op("Unsqueeze", [penalty, const("rows", np.array([1, 2], np.int64))], "mask/rows")
        bias_shape = op("Concat", [batch, one, tokens, total], "mask/bias_shape", {"axis": 0})
        mask_bias = op("Expand", [rows, bias_shape], "mask/bias")
        windows = {window_of(self._config, layer) for layer in range(len(self._widths))} - {None}
        window_bias = None
        if windows:
            # The operator's own window counts slots, padding included; tokens are what the model counts.
            to_query, to_key = (
                const("to_query", np.array([1, 3], np.int64)),
                const("to_key", np.array([1, 2], np.int64)),
            )
            queries = op("Unsqueeze", [positions, to_query], "window/queries")
            keys = op("Unsqueeze", [slots, to_key], "window/keys")
            distance = op("Sub", [queries, keys], "window/distance")
            window = const("window", np.array(windows.pop(), np.int64))
            is_outside = op("GreaterOrEqual", [distance, window], "window/outside")
            window_bias = op("Where", [is_outside, masked, mask_bias], "window/bias")
        return _Shared(
            last_slot=last_slot,
            total_tokens=total_tokens,
            mask_bias=mask_bias,
            window_bias=window_bias,
            positions=positions,
            tables=self._tables(),
        )

    def _tables(self) -> dict[str | None, _Rotary]:
        op, const = self.op, self.constant
        limits = {"first": 0, "context_tokens": context_tokens(self._config), "step": 1}
        numbers = op(
            "Range", [const(f"rotary.{name}", np.array(each)) for name, each in limits.items()], "rotary/range"
        )
        # Angles are float32 in a graph of float16 too, as the model computes them: float16 has no number beyond 65504,
        # and not each one beyond 2048.
        floats = op("Cast", [numbers], "rotary/float", {"to": ir.DataType.FLOAT.value})
        positions = op("Unsqueeze", [floats, const("rotary.columns", np.array([1]))], "rotary/positions")
        return {
            kind: self._rotary(f"rotary.{kind}" if kind else "rotary", positions, rotation)
            for kind, rotation in rotations(self.weights.model).items()
        }

    def _rotary(self, name: str, positions: ir.Value, rotation: Rotation) -> _Rotary:
        frequencies = self.constant(f"{name}.frequencies", rotation.frequencies[None])
        angles = self.op("Mul", [positions, frequencies], f"{name}/angles")
        tables = []
        for function in ("Cos", "Sin"):
            table = self.op(function, [angles], f"{name}/{function}")
            if rotation.scale != 1.0:
                scale = self.constant(f"{name}.scale", np.array(rotation.scale, np.float32))
                table = self.op("Mul", [table, scale], f"{name}/{function}/scaled")
            if self.dtype != ir.DataType.FLOAT:
                table = self.op("Cast", [table], f"{name}/{function}/cast", {"to": self.dtype.value})
            tables.append(table)
        cos, sin = tables
        return _Rotary(cos, sin, rotation.rotary_dim)

    def _attention(
        self, layer: int, widths: LayerWidths, x: ir.Value, shared: _Shared
    ) -> tuple[ir.Value, list[ir.Value]]:
        """What o_proj reads, and the layer's new keys and values."""
        prefix = f"model.layers.{layer}.self_attn"
        pasts = [
            self.input(interface.past_name(layer, part), self.dtype, interface.past_shape(widths))
            for part in interface.PARTS
        ]
        rotary = shared.tables.get(layer_kind(self._config, layer)) or shared.tables.get(None)
        if not uses_rope(self._config, layer):
            rotary = None
        inside = rotary if rotary is not None and rotary.rotary_dim % ROTARY_ALIGNMENT == 0 else None
        qkv = self._qkv(prefix, widths, x, None if inside else rotary, shared.positions)
        output, *presents = self.multi_op(
            "GroupQueryAttention",
            [
                *qkv,
                *pasts,
                shared.last_slot,
                shared.total_tokens,
                inside.cos if inside else None,
                inside.sin if inside else None,
                shared.positions if inside else None,
                shared.mask_bias if window_of(self._config, layer) is None else shared.window_bias,
            ],
            f"{prefix}/GroupQueryAttention",
            {
                "num_heads": widths.heads,
                "kv_num_heads": widths.kv_heads,
                "scale": self._traits.attention_scale or widths.head_dim**-0.5,
                "softcap": self._traits.score_softcap,
                "do_rotary": int(inside is not None),
                "rotary_interleaved": 0,
            },
            outputs=3,
            domain=MICROSOFT,
        )
        output.name = f"{prefix}/output"
        for value, part in zip(presents, interface.PARTS, strict=True):
            name = interface.present_name(layer, part)
            interface.describe(value, name, self.dtype, interface.present_shape(widths))
        return output, presents

    def _qkv(
        self, prefix: str, widths: LayerWidths, x: ir.Value, rotary: _Rotary | None, positions: ir.Value
    ) -> Sequence[ir.Value | None]:
        """Query, key and value from one product; packed in one value where nothing must be done to them apart."""
        packed_name = f"{prefix}.qkv_proj"
        is_fused = f"{packed_name}.weight" in self.weights  # Phi-3 stores them as one
        names = [packed_name] if is_fused else [f"{prefix}.{part}_proj" for part in "qkv"]
        packed = self.linear(x, *names, packed_name=packed_name)
        has_norm = f"{prefix}.q_norm.weight" in self.weights
        if not has_norm and rotary is None:
            return packed, None, None
        heads = {"q": widths.heads, "k": widths.kv_heads, "v": widths.kv_heads}
        values = self.split(packed, [count * widths.head_dim for count in heads.values()], packed_name)
        apart = dict(zip("qkv", values, strict=True))
        for part in "qk":
            if has_norm:
                apart[part] = self._head_norm(f"{prefix}.{part}_norm", apart[part], widths.head_dim)
            if rotary is not None:
                apart[part] = self.op(
                    "RotaryEmbedding",
                    [apart[part], positions, rotary.cos, rotary.sin],
                    f"{prefix}.{part}_rotary",
                    {
                        "num_heads": heads[part],
                        "interleaved": 0,
                        # 0 says all of the head, which the operator wants to hear where it is so
                        "rotary_embedding_dim": rotary.rotary_dim if rotary.rotary_dim < widths.head_dim else 0,
                    },
                    domain=MICROSOFT,
                )
        return list(apart.values())

    def _head_norm(self, name: str, x: ir.Value, head_dim: int) -> ir.Value:
        by_head = self.constant("by_head", np.array([0, 0, -1, head_dim], np.int64))
        joined = self.constant("joined", np.array([0, 0, -1], np.int64))
        heads = self.op("Reshape", [x, by_head], f"{name}/by_head")
        return self.op("Reshape", [self._norm(heads, name), joined], f"{name}/joined")

    def _gated(self, prefix: str, widths: LayerWidths, x: ir.Value) -> ir.Value:
        """What down_proj reads."""
        packed_name = f"{prefix}.gate_up_proj"
        if f"{packed_name}.weight" in self.weights:  # Phi-3 stores them as one
            gate, up = self.split(self.linear(x, packed_name), [widths.channels] * 2, packed_name)
            gate.name, up.name = f"{prefix}.gate", f"{prefix}.up"
        else:
            gate, up = (self.linear(x, f"{prefix}.{part}_proj") for part in ("gate", "up"))
        if self._traits.activation is None:
            gated = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{prefix}/sigmoid")], f"{prefix}/silu")
        else:
            kind, attributes = self._traits.activation
            gated = self.op(kind, [gate], f"{prefix}/{kind}", attributes)
        return self.op("Mul", [gated, up], f"{prefix}/product")

    def _join(
        self, residual: ir.Value, x: ir.Value, *, linear: str, inner_norm: str | None, next_norm: str
    ) -> tuple[ir.Value, ir.Value]:
        """The sum of the residual and `x` through a Linear (and a norm), and the next norm of that sum."""
        if inner_norm is not None:
            inputs = [self._norm(self.linear(x, linear), inner_norm), residual, self._norm_weight(next_norm)]
        else:
            inputs = [self.matmul(x, linear), residual, self._norm_weight(next_norm)]
            if f"{linear}.bias" in self.weights:
                inputs.append(self.initializer(f"{linear}.bias", self.weights.read(f"{linear}.bias")))
        outputs = self.multi_op(
            "SkipSimplifiedLayerNormalization",
            inputs,
            next_norm,
            {"epsilon": float(self._config.rms_norm_eps)},
            outputs=4,
            domain=MICROSOFT,
        )
        outputs[1].name = outputs[2].name = ""  # mean and inverse deviation, not wanted
        outputs[0].name, outputs[3].name = f"{next_norm}/output", f"{next_norm}/residual"
        return outputs[3], outputs[0]

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        attributes: Attributes = {"axis": -1, "epsilon": float(self._config.rms_norm_eps)}
        return self.op("SimplifiedLayerNormalization", [x, self._norm_weight(name)], name, attributes)

    def _norm_weight(self, name: str) -> ir.Value:
        weight: Array = self.weights.read(f"{name}.weight")
        return self.initializer(f"{name}.weight", weight + np.float32(self._traits.norm_offset))

    def _kept(self, x: ir.Value) -> ir.Value:
        """The last positions of x, as many as the caller wants logits of; all of them if he says nothing."""
        count = self.constant(LOGITS_TO_KEEP, np.array([0], np.int64))
        self.graph.inputs.append(count)  # so that it can be overridden; sessions do not show it as an input
        begin = self.op("Neg", [count], "lm_head/begin")
        end = self.constant("lm_head/end", np.array([np.iinfo(np.int64).max]))
        axis = self.constant("lm_head/axis", np.array([1]))
        kept = self.op("Slice", [x, begin, end, axis], "lm_head/kept")
        shape = (interface.LOGITS_SHAPE[0], "logits_length", self._config.hidden_size)
        return interface.describe(kept, "lm_head/kept/output", self.dtype, shape)

    def _lm_head(self, x: ir.Value, embedding: Table) -> ir.Value:
        if self._config.tie_word_embeddings:
            logits = self.times_table(x, embedding, "lm_head")
        else:
            logits = self.linear(x, "lm_head")
        if self._traits.logit_softcap is None:
            return logits
        cap = self.scalar("logit_softcap", self._traits.logit_softcap)
        squeezed = self.op("Tanh", [self.op("Div", [logits, cap], "lm_head/divided")], "lm_head/tanh")
        return self.op("Mul", [squeezed, cap], "lm_head/softcap")


def _norm_offset(norm: torch.nn.Module) -> float:
    """What a norm adds to its weights, asked of the norm itself: with weights of zero only that is left."""
    asked: Any = copy.deepcopy(norm).to_empty(device="cpu").requires_grad_(False)
    asked.weight.zero_()
    return float(asked(torch.ones(asked.weight.shape)).mean().round())
