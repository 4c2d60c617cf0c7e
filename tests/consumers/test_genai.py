"""onnxruntime-genai writes the tokens that our runtime writes, from the same folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consumed import BUNDLES, NEW_TOKENS, VARIANTS, decoder, greedy, prompts, until_end

from edgeprune_export.genai import MAX_LENGTH_TOKENS
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.tokenizer import Tokenizer

og = pytest.importorskip("onnxruntime_genai", reason="needs the extra 'genai'")

pytestmark = pytest.mark.consumers


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def genai_model(bundle: Path, variant: str | None = None, **settings: Any) -> Any:
    """The model of a bundle; `genai_config.json` names the default variant, an overlay another one."""
    config = og.Config(str(bundle))
    changes: dict[str, Any] = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}, **settings}
    if variant is not None:
        changes["model"]["decoder"]["filename"] = open_bundle(bundle, variant).variant.graph
    config.overlay(json.dumps(changes))
    return og.Model(config)


def written(model: Any, rows: Sequence[Sequence[int]], tokens: int = NEW_TOKENS, **search: Any) -> list[list[int]]:
    """What onnxruntime-genai writes greedily after prompts of one length."""
    width = len(rows[0])
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=width + tokens, do_sample=False, batch_size=len(rows), **search)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.asarray(rows, np.int32) if len(rows) > 1 else list(rows[0]))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[width:].tolist() for row in range(len(rows))]


def test_layers_of_the_bundles_differ_in_their_kv_heads(toy_bundle: Path) -> None:
    kv_heads = [layer.kv_heads for layer in open_bundle(toy_bundle).manifest.layers]
    assert kv_heads == [3, 1, 4]
    config = json.loads((toy_bundle / "genai_config.json").read_text("utf-8"))
    assert config["model"]["decoder"]["num_key_value_heads"] == 4  # of the others the graph itself tells


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_from_every_variant(bundle: Path, variant: str) -> None:
    model = genai_model(bundle, variant)
    for prompt in prompts(bundle):
        expected = greedy(bundle, variant, prompt)
        for shares_buffer in (True, False):
            [tokens] = written(model, [prompt], past_present_share_buffer=shares_buffer)
            assert until_end(bundle, tokens) == expected


def test_folder_as_it_is_gives_the_default_variant(bundle: Path) -> None:
    prompt = prompts(bundle)[0]
    [tokens] = written(og.Model(str(bundle)), [prompt])
    assert until_end(bundle, tokens) == greedy(bundle, open_bundle(bundle).manifest.default_variant, prompt)


def test_long_prompt_goes_in_by_pieces(bundle: Path) -> None:
    prompt = prompts(bundle)[-1]
    [tokens] = written(genai_model(bundle, "fp32", search={"chunk_size": 64}), [prompt])
    assert until_end(bundle, tokens) == greedy(bundle, "fp32", prompt)


@pytest.mark.parametrize("shares_buffer", [True, False])
def test_more_prompt_may_follow(bundle: Path, shares_buffer: bool) -> None:
    model, prompt = genai_model(bundle, "fp32"), prompts(bundle)[2]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(
        max_length=len(prompt) + NEW_TOKENS, do_sample=False, past_present_share_buffer=shares_buffer
    )
    generator = og.Generator(model, parameters)
    generator.append_tokens(list(prompt[:5]))
    generator.append_tokens(list(prompt[5:]))
    while not generator.is_done():
        generator.generate_next_token()
    assert until_end(bundle, generator.get_sequence(0)[len(prompt) :]) == greedy(bundle, "fp32", prompt)


@pytest.mark.parametrize("shares_buffer", [True, False])
def test_batch_padded_behind_equals_its_rows(bundle: Path, shares_buffer: bool) -> None:
    """onnxruntime-genai fills shorter rows up behind their tokens; padding before them it takes for text."""
    rows = prompts(bundle)[:3]
    width = max(map(len, rows))
    padding = json.loads((bundle / "genai_config.json").read_text("utf-8"))["model"]["pad_token_id"]
    padded = [[*row, *[padding] * (width - len(row))] for row in rows]
    found = written(genai_model(bundle, "fp32"), padded, past_present_share_buffer=shares_buffer)
    assert [until_end(bundle, tokens) for tokens in found] == [greedy(bundle, "fp32", row) for row in rows]


def test_length_is_capped(bundle: Path) -> None:
    """The cache is allocated for `max_length` tokens at once, so the file asks for less than a long context."""
    context_tokens = open_bundle(bundle).manifest.context_tokens
    model = og.Model(str(bundle))
    options = og.GeneratorParams(model).get_search_options()
    assert options["max_length"] == min(context_tokens, MAX_LENGTH_TOKENS)
    prompt = prompts(bundle)[1]
    assert len(written(model, [prompt], tokens=3)[0]) == 3
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=context_tokens + 1)
    with pytest.raises(RuntimeError, match="max_length"):
        og.Generator(model, parameters)


def test_its_tokenizer_gives_the_same_tokens(bundle: Path) -> None:
    theirs, ours = og.Tokenizer(genai_model(bundle)), Tokenizer.load(decoder(bundle, "fp32").bundle)
    for text in ("The capital of France is", "Zwölf Boxkämpfer – 12 %\n\n  naïve 東京 🙂"):
        tokens = theirs.encode(text)
        assert tokens.tolist() == ours.encode(text)
        assert theirs.decode(tokens) == text
