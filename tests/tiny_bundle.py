"""A tiny bundle made by hand with onnx.helper: two layers of different widths, byte-level tokenizer, no torch.

The graph takes padding on the right ("right": GroupQueryAttention counts the mask) or anywhere ("both": an attention
bias shuts masked slots out, positions come in as `position_ids`). Its golden logits are its own, so the device side can
be tested apart from export; tests of export hold the graphs against torch.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgeprune_runtime.bundle import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GOLDEN_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    FileRecord,
    Layer,
    Manifest,
    ModelInfo,
    Padding,
    Parameters,
    Variant,
    open_bundle,
)
from edgeprune_runtime.golden import GoldenCase, save_golden
from edgeprune_runtime.session import Decoder

LAYERS = (Layer(heads=4, kv_heads=2, head_dim=16, channels=24), Layer(heads=3, kv_heads=1, head_dim=16, channels=40))
HIDDEN = 32
CONTEXT = 96
GRAPH, DATA = "onnx/model.onnx", "onnx/model.onnx_data"
EOS = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}\n"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that one character of text may take several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (EOS, "<|user|>", "<|assistant|>")])
    return tokenizer


def write_bundle(
    folder: Path, *, padding: Padding = "both", seed: int = 0, scale: float = 1.0, layers: tuple[Layer, ...] = LAYERS
) -> Path:
    """Make the bundle in `folder`; `scale` widens its channels, for a second bundle that is slower."""
    layers = tuple(dataclasses.replace(layer, channels=int(layer.channels * scale)) for layer in layers)
    tokenizer = byte_tokenizer()
    (folder / "onnx").mkdir(parents=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"eos_token": {"content": EOS}}))
    (folder / CHAT_TEMPLATE_FILE).write_text(TEMPLATE)
    (folder / CONFIG_FILE).write_text(json.dumps({"model_type": "llama"}))
    save_golden(folder / GOLDEN_FILE, [])
    vocab = tokenizer.get_vocab_size()
    model, parameters = _model(layers, vocab, padding, np.random.default_rng(seed))
    onnx.save(model, folder / GRAPH, save_as_external_data=True, location=Path(DATA).name, size_threshold=64)
    manifest = Manifest(
        edgeprune_version="0.1.0",
        model=ModelInfo("tiny", "llama", "random"),
        default_variant="fp32",
        variants={"fp32": Variant(GRAPH, (DATA,), "decoder", 1e-4)},
        layers=layers,
        vocab_size=vocab,
        hidden_size=HIDDEN,
        context_tokens=CONTEXT,
        bos_token_id=None,
        eos_token_ids=(tokenizer.token_to_id(EOS),),
        pad_token_id=None,
        padding=padding,
        parameters=Parameters(parameters, parameters - 2 * vocab * HIDDEN),
        files={},
        versions={"onnx": onnx.__version__},
    )
    record(folder, manifest)
    save_golden(folder / GOLDEN_FILE, _golden(folder, vocab))
    record(folder, manifest)
    return folder


def record(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the files as they are now."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: FileRecord.of(folder / name) for name in names if name != "edgeprune.json"}
    dataclasses.replace(manifest, files=files).save(folder)


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Overwrite top-level fields of the manifest, as a careless or hostile hand would."""
    path = folder / "edgeprune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(folder: Path, name: str, change: Any) -> None:
    """Replace a weight by `change(weight)` and let the manifest vouch for the result."""
    model = onnx.load(folder / GRAPH)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    (folder / DATA).unlink()
    onnx.save(model, folder / GRAPH, save_as_external_data=True, location=Path(DATA).name, size_threshold=64)
    record(folder, Manifest.load(folder))


def _golden(folder: Path, vocab: int) -> list[GoldenCase]:
    decoder = Decoder(open_bundle(folder), threads=1)
    cases = []
    for seed, length in enumerate((1, 7, 40)):
        ids = np.random.default_rng(seed).integers(0, vocab, length)
        logits, _ = decoder.forward(ids[None])
        positions = np.unique(np.linspace(0, length - 1, 9).astype(np.int64))
        step, cache = decoder.prefill([ids])
        greedy = []
        for _ in range(6):
            greedy.append(int(step[0].argmax()))
            step, cache = decoder.step(greedy[-1:], cache)
        cases.append(GoldenCase(ids, positions, logits[0, positions], np.array(greedy)))
    return cases


def _model(layers: tuple[Layer, ...], vocab: int, padding: Padding, random: Any) -> tuple[onnx.ModelProto, int]:
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        values = random.standard_normal(shape).astype(np.float32) * np.float32(shape[0] ** -0.5)
        weights.append(numpy_helper.from_array(values, name))
        return name

    def const(name: str, value: Any, dtype: Any) -> str:
        weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def op(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        domain = "com.microsoft" if kind in ("GroupQueryAttention", "RotaryEmbedding") else ""
        nodes.append(helper.make_node(kind, inputs, attributes.pop("outputs", [output]), domain=domain, **attributes))
        return output

    weights.append(numpy_helper.from_array(random.standard_normal((vocab, HIDDEN)).astype(np.float32), "embed"))
    parameters = vocab * HIDDEN
    last, total, rotary = _mask_values(op, const, padding)
    angles = np.arange(CONTEXT)[:, None] * 100.0 ** (-np.arange(8) / 8)
    const("cos", np.cos(angles), np.float32)
    const("sin", np.sin(angles), np.float32)
    const("one_scale", np.ones(HIDDEN), np.float32)
    x = op("Gather", ["embed", "input_ids"], "embedded")
    ints, floats = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("input_ids", ints, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", ints, ["batch_size", "total_sequence_length"]),
    ]
    if padding == "both":
        inputs.append(helper.make_tensor_value_info("position_ids", ints, ["batch_size", "sequence_length"]))
    outputs = [helper.make_tensor_value_info("logits", floats, ["batch_size", "sequence_length", vocab])]
    for i, layer in enumerate(layers):
        q_width, kv_width = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        normed = op("SimplifiedLayerNormalization", [x, "one_scale"], f"n{i}", axis=-1, epsilon=1e-5)
        qkv = [
            op("MatMul", [normed, weight(f"{part}_{i}", HIDDEN, width)], f"{part}{i}")
            for part, width in (("q", q_width), ("k", kv_width), ("v", kv_width))
        ]
        if padding == "both":
            # In a prompt the attention operator counts slots whatever positions it is given, so rotation stands apart.
            for j, heads in ((0, layer.heads), (1, layer.kv_heads)):
                inputs_ = [qkv[j], "position_ids", "cos", "sin"]
                qkv[j] = op("RotaryEmbedding", inputs_, f"{qkv[j]}_rotated", num_heads=heads)
        pasts = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        presents = [f"present.{i}.{part}" for part in ("key", "value")]
        for names, infos, axis in (
            (pasts, inputs, "past_sequence_length"),
            (presents, outputs, "total_sequence_length"),
        ):
            shape = ["batch_size", layer.kv_heads, axis, layer.head_dim]
            infos += [helper.make_tensor_value_info(name, floats, shape) for name in names]
        attended = op(
            "GroupQueryAttention",
            [*qkv, *pasts, last, total, *rotary],
            f"a{i}",
            outputs=[f"a{i}", *presents],
            num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            do_rotary=int(padding == "right"),
        )
        x = op("Add", [x, op("MatMul", [attended, weight(f"o_{i}", q_width, HIDDEN)], f"o{i}")], f"x{i}")
        normed = op("SimplifiedLayerNormalization", [x, "one_scale"], f"m{i}", axis=-1, epsilon=1e-5)
        up = op("Tanh", [op("MatMul", [normed, weight(f"up_{i}", HIDDEN, layer.channels)], f"up{i}")], f"act{i}")
        x = op("Add", [x, op("MatMul", [up, weight(f"down_{i}", layer.channels, HIDDEN)], f"down{i}")], f"y{i}")
        parameters += 2 * HIDDEN * (q_width + kv_width + layer.channels)
    op("MatMul", [x, weight("lm_head", HIDDEN, vocab)], "logits")
    parameters += vocab * HIDDEN
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), parameters


def _mask_values(op: Any, const: Any, padding: Padding) -> tuple[str, str, list[str]]:
    """Names of `seqlens_k` (B,), `total_sequence_length`, and the operator's further inputs."""
    total = op("Cast", [op("Shape", ["attention_mask"], "mask_t0", start=1, end=2)], "mask_t1", to=TensorProto.INT32)
    scalar = op("Squeeze", [total], "mask_t2")
    one, axis = const("one", [1], np.int32), const("axis", [1], np.int64)
    if padding == "right":
        counted = op("ReduceSum", ["attention_mask", axis], "mask_c0", keepdims=0)
        return (
            op("Sub", [op("Cast", [counted], "mask_c1", to=TensorProto.INT32), one], "mask_c2"),
            scalar,
            ["cos", "sin"],
        )
    batch = op("Shape", ["attention_mask"], "mask_b0", start=0, end=1)
    last = op("Expand", [op("Sub", [total, one], "mask_l0"), batch], "mask_l1")
    absent = op("Sub", [const("one_f", 1, np.float32), op("Cast", ["attention_mask"], "mask_m0", to=1)], "mask_m1")
    rows = op(
        "Unsqueeze",
        [op("Mul", [absent, const("low", -1e9, np.float32)], "mask_m2"), const("a12", [1, 2], np.int64)],
        "mask_m3",
    )
    tokens = op("Shape", ["input_ids"], "mask_s0", start=1, end=2)
    total64 = op("Shape", ["attention_mask"], "mask_s1", start=1, end=2)
    bias_shape = op("Concat", [batch, const("one64", [1], np.int64), tokens, total64], "mask_s2", axis=0)
    return last, scalar, ["", "", "", op("Expand", [rows, bias_shape], "mask_m4")]
