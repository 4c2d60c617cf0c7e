"""Calibration text: every source, every way it can be wrong, and the draw of windows."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import toy
from transformers import PreTrainedTokenizerFast

from edgeprune import calibration, precision
from edgeprune.calibration import gather, hash_file, sample, split
from edgeprune.precision import fastest_dtype
from edgeprune_runtime.errors import EdgepruneError

EOS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other in models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, `eos` between documents."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": EOS} | {chr(97 + i): 3 + i for i in range(26)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model() -> Any:
    return toy("llama")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], str]:
    def write(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture(autouse=True)
def hub_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the environment says


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_hub_answers", lambda: False)


def letters(count: int) -> str:
    return " ".join(chr(97 + i * i % 26) for i in range(count))


def test_text_file_gives_windows_with_their_hash(write, tokenizer, model):
    drawn = gather(write("a.txt", letters(100)), tokenizer, model, sequences=4, length_tokens=16)
    assert drawn.ids.shape == (4, 16)
    assert drawn.ids.dtype == torch.int64
    assert drawn.sha256 == hashlib.sha256(drawn.ids.numpy().astype("<i8").tobytes()).hexdigest()
    record = drawn.record()
    assert (record.source, record.sequences, record.length_tokens) == ("the file a.txt", 4, 16)
    assert record.sha256 == drawn.sha256


def test_same_seed_same_windows_and_another_seed_others(write, tokenizer, model):
    spec = write("a.txt", letters(400))
    first, again, other = (
        gather(spec, tokenizer, model, sequences=4, length_tokens=16, seed=seed) for seed in (0, 0, 1)
    )
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_windows_do_not_overlap_and_cover_the_text(write, tokenizer, model):
    text = " ".join(chr(97 + i) for i in range(26))  # every letter once, then eos: 27 tokens
    drawn = gather(write("a.txt", text), tokenizer, model, sequences=9, length_tokens=3, seed=3)
    assert sorted(drawn.ids.flatten().tolist()) == sorted([EOS, *range(3, 29)])


def test_short_documents_are_joined_not_dropped(write, tokenizer, model):
    rows = "\n".join(json.dumps({"text": letter}) for letter in "abcd") + "\n\n"
    drawn = gather(write("a.jsonl", rows), tokenizer, model, sequences=1, length_tokens=8)
    assert drawn.ids.tolist() == [[3, EOS, 4, EOS, 5, EOS, 6, EOS]]


def test_byte_order_mark_and_crlf_are_no_text(write, tokenizer, model):
    drawn = gather(write("a.txt", b"\xef\xbb\xbfa b\r\nc d"), tokenizer, model, sequences=1, length_tokens=5)
    assert drawn.ids.tolist() == [[3, 4, 5, 6, EOS]]


def test_too_short_text_says_how_many_tokens_it_has_and_what_fits(write, tokenizer, model):
    with pytest.raises(EdgepruneError, match=r"has 101 tokens, but 8 x 16 = 128 .* at most --calibration-sequences 6,"):
        gather(write("a.txt", letters(100)), tokenizer, model, sequences=8, length_tokens=16)
    with pytest.raises(EdgepruneError, match=r"asked for; give more text, or fewer --calibration-tokens$"):
        gather(write("a.txt", letters(3)), tokenizer, model, sequences=1, length_tokens=16)


def test_too_short_text_says_what_is_held_out_of_it(write, tokenizer, model):
    with pytest.raises(EdgepruneError, match=r"128, 2 of them held out .* at most --calibration-sequences 4,"):
        gather(write("a.txt", letters(100)), tokenizer, model, sequences=6, held_out=2, length_tokens=16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "is empty"),
        ("a.txt", b"abc \xff\xfe", r"not UTF-8 text \(byte 4\)"),
        ("a.txt", b"PK\x03\x04\x00\x00", "binary data"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a b"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a b"}\n\n{"prompt": "a"}', 'line 3 has no string "text"; one object'),
        ("a.jsonl", b'{"text": 7}', 'line 1 has no string "text"'),
        ("a.jsonl", b'["a"]', 'line 1 has no string "text"'),
        ("a.jsonl", b'{"text": "\\ud800 abc"}', r"line 1 holds '\\ud800', which is no character"),
        ("a.jsonl", b'{"text": ""}', "has 0 tokens"),
        ("a.csv", b"a b c", r"ends with '.csv'; expected .txt or .jsonl"),
    ],
)
def test_what_is_not_text_is_refused_in_one_line(write, tokenizer, model, name, content, message):
    with pytest.raises(EdgepruneError, match=message) as caught:
        gather(write(name, content), tokenizer, model, sequences=1, length_tokens=4)
    assert "\n" not in str(caught.value)


def test_too_large_a_file_is_refused_before_it_is_read(write, tokenizer, model, monkeypatch):
    monkeypatch.setattr(calibration, "_MAX_FILE_BYTES", 10)
    with pytest.raises(EdgepruneError, match="has 19 bytes; give at most 10"):
        gather(write("a.txt", letters(10)), tokenizer, model, sequences=1, length_tokens=4)
    with pytest.raises(EdgepruneError, match="has 19 bytes; give at most 10"):
        hash_file(write("a.txt", letters(10)))


def test_hash_is_of_the_file_that_a_spec_names_if_it_names_one(write):
    assert hash_file(write("a.txt", "a b")) == hashlib.sha256(b"a b").hexdigest()
    assert [hash_file(spec) for spec in (None, "self", "hf:wikitext")] == [None] * 3


@pytest.mark.parametrize("spec", ["nowhere.txt", "wikitext", ""])
def test_unknown_spec_names_the_forms(tokenizer, model, spec):
    with pytest.raises(EdgepruneError, match=r"is no file; expected a \.txt or \.jsonl file, hf:OWNER/NAME"):
        gather(spec, tokenizer, model, sequences=1, length_tokens=8)


@pytest.mark.parametrize(
    ("sequences", "length_tokens", "message"),
    [(1, 129, "beyond the model's context; give at most 128"), (0, 16, "at least 1 sequence"), (1, 1, "of 2 tokens")],
)
def test_impossible_sizes_are_refused(tokenizer, model, sequences, length_tokens, message):
    with pytest.raises(EdgepruneError, match=message):
        gather("self", tokenizer, model, sequences=sequences, length_tokens=length_tokens)


def test_tokenizer_of_another_model_is_refused(write, tokenizer):
    with pytest.raises(EdgepruneError, match="expected the model's own tokenizer"):
        gather(write("a.txt", letters(60)), tokenizer, toy("llama", vocab_size=20), sequences=2, length_tokens=16)


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands for `datasets.load_dataset`: remembers what it was asked for."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        self.rows, self.error, self.asked, self.read = rows, error, (), 0

    def __call__(self, path: str, name: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.asked, self.streaming = (path, name, split), streaming
        if self.error is not None:
            raise self.error
        return self.stream()

    def stream(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.read += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub([{"text": letters(20)}] * 1000)
    monkeypatch.setattr(calibration, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:test", ("owner/name", None, "test")),
        ("hf:owner/name/config", ("owner/name", "config", "train")),
        ("hf:owner/name/config:validation", ("owner/name", "config", "validation")),
        ("hf:name", ("name", None, "train")),
        (None, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
    ],
)
def test_hub_spec_names_data_set_config_and_split(hub, tokenizer, model, spec, asked):
    drawn = gather(spec, tokenizer, model, sequences=2, length_tokens=16)
    assert hub.asked == asked
    assert asked[0] in drawn.source
    assert f"split {asked[2]}" in drawn.source


@pytest.mark.parametrize("spec", ["hf:", "hf:a//b", "hf:a/b/c/d", "hf:a/b:"])
def test_malformed_hub_spec_is_refused(hub, tokenizer, model, spec):
    with pytest.raises(EdgepruneError, match="is not of the form"):
        gather(spec, tokenizer, model, sequences=1, length_tokens=8)


def test_only_as_much_of_a_hub_data_set_is_read_as_is_needed(hub, tokenizer, model, monkeypatch):
    monkeypatch.setattr(calibration, "_TOKENIZE_BATCH", 10)
    gather("hf:owner/name", tokenizer, model, sequences=2, length_tokens=16)
    assert hub.read < 50


def test_hub_data_set_without_text_names_its_columns(hub, tokenizer, model):
    hub.rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(EdgepruneError, match='has no column "text"; its columns are question, answer'):
        gather("hf:owner/name", tokenizer, model, sequences=1, length_tokens=8)


def test_unreachable_hub_is_an_error_when_asked_for(offline, tokenizer, model):
    with pytest.raises(EdgepruneError, match="does not answer; give a text file or self"):
        gather("hf:owner/name", tokenizer, model, sequences=1, length_tokens=8)


def test_unreachable_hub_means_self_by_default_and_the_source_says_so(offline, tokenizer, model):
    drawn = gather(None, tokenizer, model, sequences=2, length_tokens=8)
    assert drawn.source == (
        "text that the model wrote itself (hf:Salesforce/wikitext/wikitext-2-raw-v1:train could not be reached)"
    )


def test_hub_that_fails_after_the_probe_means_self_by_default_with_a_warning(hub, tokenizer, model, caplog):
    hub.error = ConnectionError("gone")
    drawn = gather(None, tokenizer, model, sequences=2, length_tokens=8)
    assert "wrote itself" in drawn.source
    assert "gone" in caplog.text
    with pytest.raises(EdgepruneError, match="cannot be loaded: gone"):
        gather("hf:owner/name", tokenizer, model, sequences=2, length_tokens=8)


def test_default_text_with_a_wrong_tokenizer_is_an_error_not_self(hub, tokenizer):
    with pytest.raises(EdgepruneError, match="own tokenizer"):
        gather(None, tokenizer, toy("llama", vocab_size=20), sequences=2, length_tokens=8)


def test_hub_set_offline_is_not_asked_and_its_cache_is_read(hub, tokenizer, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    drawn = gather("hf:owner/name", tokenizer, model, sequences=1, length_tokens=8)
    assert hub.streaming is False
    assert drawn.source == "owner/name, split train"


def test_probe_of_a_hub_that_hangs_gives_up(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(calibration, "_PROBE_SECONDS", 0.05)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: release.wait(5))
    assert not calibration._hub_answers()
    release.set()


# --- text that the model writes ---------------------------------------------------------------------------------------


def test_self_text_is_the_same_for_a_seed_and_begins_with_bos(tokenizer, model):
    first, again, other = (gather("self", tokenizer, model, sequences=3, length_tokens=24, seed=s) for s in (5, 5, 6))
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert first.source == "text that the model wrote itself"
    assert first.ids[:, 0].tolist() == [1, 1, 1]


def test_self_text_begins_a_new_document_after_eos(model):
    ids = sample(model, 16, 64)
    follows = ids[:, 1:][ids[:, :-1] == EOS]
    assert len(follows) > 0
    assert follows.unique().tolist() == [1]


def test_self_text_of_a_model_with_one_token_for_both_ends_does_not_repeat_it():
    ids = sample(toy("llama", bos_token_id=EOS), 16, 64)
    assert (ids[:, 1:][ids[:, :-1] == EOS] != EOS).any()


def test_self_text_longer_than_a_document_or_a_batch_is_whole(model, monkeypatch):
    monkeypatch.setattr(calibration, "_DOCUMENT_TOKENS", 8)
    monkeypatch.setattr(calibration, "_SAMPLE_ROWS", 4)
    seen: list[tuple[int, int]] = []
    ids = sample(model, 3, 20, progress=lambda done, total: seen.append((done, total)))
    assert ids.shape == (3, 20)
    assert ids[:, ::7].eq(1).all()  # 3 documents of 7 tokens, cut to 20
    assert seen[-1] == (63, 63)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_self_text_follows_the_model(monkeypatch):
    """With the cache, each drawn token has the probability that an uncached float32 forward gives it."""
    monkeypatch.setattr(calibration, "fastest_dtype", lambda: torch.float32)
    greedy: list[torch.Tensor] = []

    def most_likely(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        greedy.append(logits)
        return logits.argmax(-1, keepdim=True)

    monkeypatch.setattr(calibration, "_draw", most_likely)
    for name in ("llama", "smollm3", "qwen3"):
        greedy.clear()
        model = toy(name, eos_token_id=None)
        ids = sample(model, 2, 12)
        with torch.no_grad():
            expected = model(input_ids=ids).logits[:, :-1]
        torch.testing.assert_close(torch.stack(greedy, 1), expected, atol=1e-5, rtol=1e-5)


def test_self_text_after_eos_is_written_without_sight_of_what_came_before(monkeypatch):
    monkeypatch.setattr(calibration, "fastest_dtype", lambda: torch.float32)
    drawn: list[torch.Tensor] = []

    def end_in_the_middle(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(logits)
        return torch.tensor([[EOS if len(drawn) == 4 else 9], [EOS if len(drawn) == 6 else 5]])

    monkeypatch.setattr(calibration, "_draw", end_in_the_middle)
    model = toy("llama")
    ids = sample(model, 2, 12)
    for row, begin in ((0, 5), (1, 7)):
        assert ids[row, begin - 1 : begin + 1].tolist() == [EOS, 1]
        with torch.no_grad():
            alone = model(input_ids=ids[row : row + 1, begin:]).logits[0, :-1]
        torch.testing.assert_close(torch.stack(drawn)[begin:, row], alone, atol=1e-5, rtol=1e-5)


def test_draw_follows_the_distribution():
    logits = torch.log(torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])).expand(20_000, 6)
    drawn = calibration._draw(logits, torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    assert shares[[0, 3, 5]].eq(0).all()
    torch.testing.assert_close(shares[[1, 2, 4]], torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)


def test_sampling_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        sample(model, 2, 8)
        assert model.training
    finally:
        model.eval()
    assert model.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_model_with_nan_weights_cannot_write_text():
    broken = toy("llama")
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(EdgepruneError, match="not finite"):
        sample(broken, 1, 4)


def test_model_without_begin_and_end_cannot_write_text():
    with pytest.raises(EdgepruneError, match="begin- or end-of-text token; give a text file"):
        sample(toy("llama", bos_token_id=None, eos_token_id=None), 1, 4)


# --- held-out sequences and number format -----------------------------------------------------------------------------


def test_split_parts_the_sequences_and_hashes_each(write, tokenizer, model):
    whole = gather(write("a.txt", letters(200)), tokenizer, model, sequences=8, length_tokens=16)
    used, held = split(whole, 3)
    assert torch.equal(torch.cat([used.ids, held.ids]), whole.ids)
    assert len(held.ids) == 3
    assert len({whole.sha256, used.sha256, held.sha256}) == 3
    assert used.source == held.source == whole.source


@pytest.mark.parametrize("held_out", [0, 8, -1])
def test_split_that_leaves_a_part_empty_is_refused(write, tokenizer, model, held_out):
    whole = gather(write("a.txt", letters(200)), tokenizer, model, sequences=8, length_tokens=16)
    with pytest.raises(EdgepruneError, match="expected 1 to 7"):
        split(whole, held_out)


def test_fastest_dtype_is_probed_once():
    fastest_dtype.cache_clear()
    assert fastest_dtype(0.02) in (torch.bfloat16, torch.float32)
    fastest_dtype(0.02)
    assert fastest_dtype.cache_info().hits == 1
    fastest_dtype.cache_clear()


def test_a_format_that_this_cpu_emulates_is_not_probed_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[torch.dtype] = []

    def products_per_second(dtype: torch.dtype, seconds: float) -> float:
        probed.append(dtype)
        return 1.0 if dtype == torch.bfloat16 else 100.0

    monkeypatch.setattr(precision, "_products_per_second", products_per_second)
    fastest_dtype.cache_clear()
    assert fastest_dtype() == torch.float32
    assert sorted(map(str, probed)) == ["torch.bfloat16", "torch.float32"]
    fastest_dtype.cache_clear()
