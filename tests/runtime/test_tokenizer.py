"""Text goes to ids and back, streams by whole characters, and chat templates stay in their sandbox."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import TEMPLATE, record

from edgeprune_runtime.bundle import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.tokenizer import TextStream, Tokenizer, stream_text
from edgeprune_runtime.untrusted import blaming

TEXT = "naïve – 漢字 🙂🏽 end"


@pytest.fixture(scope="module")
def tokenizer(both_folder: Path) -> Tokenizer:
    return Tokenizer.load(open_bundle(both_folder))


def test_text_survives_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_stream_gives_whole_characters_only(tokenizer: Tokenizer) -> None:
    pieces = list(stream_text(tokenizer, tokenizer.encode(TEXT)))
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[2:4] == ["ï", "v"]


def test_stream_ends_with_broken_bytes_as_replacements(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    first_bytes = tokenizer.encode("a漢")[:-1]
    assert [stream.push(token) for token in first_bytes] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_does_not_hold_broken_bytes_for_ever(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    broken = tokenizer.encode("漢")[:1]
    assert "\ufffd" in "".join(stream.push(broken[0]) for _ in range(12))


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|>hi<|end|>")
    assert len(ids) == 4
    assert "".join(stream_text(tokenizer, ids)) == "hi"


def test_chat_is_rendered_and_tokenized(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|user|>hi<|end|>\n<|assistant|>"
    assert len(tokenizer.encode_chat([{"role": "user", "content": "hi"}])) == 6


def _with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    return dataclasses.replace(tokenizer, chat_template=template)


def test_functions_that_templates_expect_are_there(tokenizer: Tokenizer) -> None:
    template = "{{ messages | tojson }}{{ strftime_now('%Y') | length }}{% for m in messages %}{% break %}{% endfor %}"
    text = _with_template(tokenizer, template).render_chat([{"role": "user", "content": "<é>"}])
    assert text == '[{"role": "user", "content": "<é>"}]4'


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{%- for m in messages %}\n  {{- m.role + ': ' + m['content'] | trim + eos_token }}\n  {%- endfor %}\n{{ x }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}\n{{ ns.n }}\n",
        "{{ messages | tojson }}",
    ],
)
def test_templates_give_what_transformers_gives(tokenizer: Tokenizer, template: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    messages = [{"role": "system", "content": " be <b>brief</b> "}, {"role": "user", "content": "hi\nthere"}]
    expected, *_ = render([messages], chat_template=template, add_generation_prompt=True, eos_token="<|end|>")
    assert _with_template(tokenizer, template).render_chat(messages) == expected[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system message') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) | list }}",
        "{{ 'a' | dictsort }}",
        "{{ 5 | xmlattr }}",
        "{{ 'a' * 10**11 }}",
        "{{ 10**11 * messages }}",
        "{{ 9 ** (9 ** 9) }}",
    ],
)
def test_template_that_fails_or_escapes_is_one_error(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(EdgepruneError, match="the chat template refuses"):
        _with_template(tokenizer, template).render_chat([{"role": "user", "content": "hi"}])


def test_products_of_bearable_size_are_made(tokenizer: Tokenizer) -> None:
    template = "{{ '-' * 3 }}{{ 2 * [0] }}{{ 6 * 7.0 }}{{ 2 ** 10 }}{{ 4 ** 0.5 }}"
    assert _with_template(tokenizer, template).render_chat([]) == "---[0, 0]42.010242.0"


def test_template_that_renders_half_a_character_is_one_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(EdgepruneError, match="fails on this text"):
        _with_template(tokenizer, "{{ '\\ud800' }}").encode_chat([])


def test_absent_template_is_said(tokenizer: Tokenizer) -> None:
    with pytest.raises(EdgepruneError, match="no chat template"):
        _with_template(tokenizer, None).render_chat([])


def test_template_may_stand_in_the_config(folder: Path) -> None:
    (folder / CHAT_TEMPLATE_FILE).unlink()
    for template in (TEMPLATE, [{"name": "default", "template": TEMPLATE}]):
        (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"chat_template": template}))
        record(folder, Manifest.load(folder))
        assert Tokenizer.load(open_bundle(folder)).chat_template == TEMPLATE


def _change_tokenizer(folder: Path, **parts: Any) -> None:
    file = folder / TOKENIZER_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    record(folder, Manifest.load(folder))


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ],
)
def test_broken_tokenizer_is_one_error(folder: Path, parts: dict[str, Any]) -> None:
    _change_tokenizer(folder, **parts)
    with pytest.raises(EdgepruneError, match="is not a tokenizer") as error:
        Tokenizer.load(open_bundle(folder))
    assert "\n" not in str(error.value)


UNLISTED = [{"SpecialToken": {"id": "X", "type_id": 0}}]


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}},
        {"model": {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "?"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "^(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"post_processor": {"type": "TemplateProcessing", "single": UNLISTED, "pair": [], "special_tokens": {}}},
    ],
)
def test_tokenizer_that_fails_at_work_is_one_error(folder: Path, parts: dict[str, Any]) -> None:
    _change_tokenizer(folder, **parts)
    hostile = Tokenizer.load(open_bundle(folder))
    with pytest.raises(EdgepruneError, match="tokenizer fails on this text") as error:
        hostile.encode("a" * 40 + "!")
    assert "\n" not in str(error.value)


def test_interrupted_work_is_not_the_fault_of_the_data() -> None:
    with pytest.raises(KeyboardInterrupt), blaming("the tokenizer fails", "copy it again"):
        raise KeyboardInterrupt


def test_template_behind_a_link_out_of_the_bundle_is_refused(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("secret")
    bundle = open_bundle(folder)
    (folder / CHAT_TEMPLATE_FILE).unlink()
    (folder / CHAT_TEMPLATE_FILE).symlink_to(secret)
    with pytest.raises(EdgepruneError, match="leads out of"):
        Tokenizer.load(bundle)
