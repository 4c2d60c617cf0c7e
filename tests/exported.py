"""Checkpoints with other widths in every layer, and their graphs, for the tests of export."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import toys
from cuts import groups_of, random_keep
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgeprune import checkpoint
from edgeprune.calibration import Calibration
from edgeprune.groups import layer_widths
from edgeprune.plan import SparsityRecord
from edgeprune.shrink import LinearShape, linear_of, shrink
from edgeprune.sparsify import Sparsity, sparsify
from edgeprune_export import decoder
from edgeprune_export.external_data import ExternalData
from edgeprune_export.quantize import FLOAT32, RoundedWeights
from edgeprune_export.weights import Weights

SAMPLE = [np.random.default_rng(0).integers(3, toys.COMMON["vocab_size"], 400).tolist()]
"""Token ids to compare on: a toy has read nothing, so any text will do."""


Record = tuple[SparsityRecord, dict[str, int]]
"""What `check_zeros` is told of a model: where its zeros should be, and how many outputs each Linear has."""


def record_of(model: Any, sparsity: Sparsity) -> Record:
    record = sparsity.record(groups_of(model))
    return record, {name: LinearShape.of(linear_of(model, name)).out_features for name in record.sides}


def letter_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One token per printable character, as many as a toy's vocabulary has."""
    letters = ["<unk>", "\n", *string.printable[:95]]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **settings)


def pruned(
    folder: Path,
    name: str,
    seed: int = 3,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    sparsity: Sparsity | None = None,
    **changes: Any,
) -> Any:
    """A toy cut to other widths in every layer, with zeros if asked for; saved as a checkpoint, and returned."""
    model = toys.toy(name, **changes)
    groups = groups_of(model)
    keep = random_keep(groups, seed)
    shrink(model, groups, keep)
    if sparsity is not None:
        sparsify(model, sparsity, Calibration(torch.tensor(SAMPLE)[:, :16], "test", 0, ""))
    checkpoint.save(model, tokenizer or letter_tokenizer(), None, layer_widths(groups, keep), folder)
    return model


def decoder_graph(source: Path, folder: Path) -> Path:
    """The declarative graph of a checkpoint, written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExternalData(folder / "model.onnx_data") as data:
        model = decoder.build(RoundedWeights(Weights(source), FLOAT32), data)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def genai_continuation(bundle: Path, prompt: list[int], tokens: int) -> list[int]:
    """What onnxruntime-genai writes greedily after a prompt, at most so many tokens; skips without that package."""
    og: Any = pytest.importorskip("onnxruntime_genai", reason="needs the extra 'genai'")
    model = og.Model(str(bundle))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    continuation: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
    return continuation
