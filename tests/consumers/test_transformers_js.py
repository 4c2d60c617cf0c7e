"""transformers.js writes in Node the tokens that our runtime writes, from the same folder and the same text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import javascript
import pytest
import toys
from consumed import BUNDLES, NEW_TOKENS, TEXTS, VARIANTS, decoder, greedy, until_end
from exported import pruned

from edgeprune_export.exporting import export
from edgeprune_export.quantize import PRECISIONS
from edgeprune_runtime.bundle import open_bundle, transformers_js_dtype
from edgeprune_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.consumers

SCRIPT = javascript.EXAMPLES / "node" / "generate.mjs"
# As many characters as fit the toys' context of bytes, and more than our runtime feeds at once.
PROMPTS = (*TEXTS[:-1], TEXTS[-1][:900], "Zwölf Boxkämpfer – 12 %\n\n  naïve 東京 🙂")


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    javascript.need_node()  # before a bundle is made
    return request.getfixturevalue(request.param)


def tokens(bundle: Path, prompt: str, *, is_chat: bool) -> tuple[int, ...]:
    tokenizer = Tokenizer.load(open_bundle(bundle))
    if is_chat:
        return tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}]))
    return tuple(tokenizer.encode(prompt))


def written(folder: Path, bundle: Path, prompts: Sequence[str], *options: str) -> list[dict[str, Any]]:
    """What the example gives for prompts."""
    limit = ("--max-new-tokens", str(NEW_TOKENS))
    answers = javascript.results(javascript.run(SCRIPT, folder, bundle, *prompts, "--json", *limit, *options))
    assert len(answers) == len(prompts)
    return answers


def assert_same(bundle: Path, variant: str, answer: dict[str, Any], prompt: tuple[int, ...]) -> None:
    ours = greedy(bundle, variant, prompt)
    assert tuple(answer["prompt"]) == prompt
    assert until_end(bundle, answer["ids"]) == ours
    assert len(answer["ids"]) <= min(len(ours) + 1, NEW_TOKENS)  # it stops at the token that ends a text


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_same_tokens_from_every_variant(bundle: Path, variant: str, is_chat: bool, tmp_path: Path) -> None:
    options = ("--dtype", transformers_js_dtype(variant), *(() if is_chat else ("--raw",)))
    answers = written(tmp_path, bundle, PROMPTS, *options)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["dtype"] == transformers_js_dtype(variant)
        assert_same(bundle, variant, answer, tokens(bundle, prompt, is_chat=is_chat))


def test_text_is_that_of_the_tokens(bundle: Path, tmp_path: Path) -> None:
    done = javascript.run(SCRIPT, tmp_path, bundle, PROMPTS[0], "--raw", "--max-new-tokens", NEW_TOKENS)
    assert done.returncode == 0, done.stderr
    opened = decoder(bundle, open_bundle(bundle).manifest.default_variant).bundle
    ours = greedy(bundle, opened.variant_name, tokens(bundle, PROMPTS[0], is_chat=False))
    assert done.stdout.strip() == Tokenizer.load(opened).decode(ours).strip()


@pytest.mark.parametrize(
    ("variant", "details"),
    [("int8", {}), ("int8-dynamic", {}), ("int4", {}), ("int4", {"table_bits": 4})],
    ids=["int8", "int8-dynamic", "int4", "int4 with tables of four bits"],
)
def test_folder_as_it_is_gives_the_default_variant(
    toy_bundle: Path, variant: str, details: dict[str, int], tmp_path: Path
) -> None:
    """Without a dtype transformers.js would look for fp32 here, and for q8 in a browser; the config says better."""
    precision = replace(PRECISIONS[variant], max_perplexity_ratio=9.0, min_argmax_agreement=0.0, **details)
    export(toy_bundle.with_name("checkpoint"), tmp_path / "bundle", precisions=[precision])
    [answer] = written(tmp_path, tmp_path / "bundle", PROMPTS[:1], "--raw")
    assert answer["dtype"] == transformers_js_dtype(variant)
    assert_same(tmp_path / "bundle", variant, answer, tokens(tmp_path / "bundle", PROMPTS[0], is_chat=False))


@pytest.mark.parametrize("name", toys.NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """With other widths in every layer; letters are tokens."""
    javascript.need_node()
    pruned(tmp_path / "checkpoint", name)
    bundle = tmp_path / "bundle"
    export(tmp_path / "checkpoint", bundle)
    prompts = ("the cook", "a")
    for prompt, answer in zip(prompts, written(tmp_path, bundle, prompts, "--raw"), strict=True):
        assert_same(bundle, "fp32", answer, tokens(bundle, prompt, is_chat=False))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere", "a prompt"), "nowhere has no edgeprune.json; give the folder of a bundle"),
        ((".",), "usage:"),
        ((".", "a prompt", "--max-new-tokens", "0"), "usage:"),
        ((".", "a prompt", "--dtype", "q3"), "usage:"),
        ((".", "a prompt", "--temperature", "1"), "usage:"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = javascript.run(SCRIPT, tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
