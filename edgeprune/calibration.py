"""Calibration tokens: what the statistics of a model are gathered on.

A spec names the text:

    notes.txt, notes.jsonl            a UTF-8 text file (one document), or one JSON object with "text" per line
    hf:OWNER/NAME[/CONFIG][:SPLIT]    a data set of the Hugging Face hub, column "text"; SPLIT is "train" if not given
    self                              the model writes its own text by sampling: no data, works offline
    (none)                            WikiText-2 train if the hub can be reached, else `self`; `source` says which

A hub data set without an owner is written `hf:NAME[:SPLIT]`.

Documents are joined with the tokenizer's end-of-text token, so that short ones are not lost, and random windows that do
not overlap are drawn from the whole.
"""

import codecs
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from edgeprune.journal import Entry
from edgeprune.plan import CalibrationRecord
from edgeprune.precision import copy_in, fastest_dtype
from edgeprune.streaming import Decoder
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.text import jsonl_rows
from edgeprune_runtime.untrusted import blaming

logger = logging.getLogger(__name__)

DEFAULT_SPEC = "hf:Salesforce/wikitext/wikitext-2-raw-v1:train"
SELF_SPEC = "self"
_HUB_PREFIX, _ROWS_SUFFIX = "hf:", ".jsonl"

Progress = Callable[[int, int], None]
"""Called with (done, total) as the work goes on."""

_LINES_OF_ONE_TEXT = ("Salesforce/wikitext", "wikitext")  # rows are lines, not documents: joined as GPTQ and Wanda do
_HUB_TOKENS_PER_ASKED = (
    16  # how much of a hub data set is read: enough to draw from, and C4 alone has 156 billion tokens
)
_PROBE_SECONDS = 3.0  # the hub libraries themselves retry for more than 20 s
_MAX_FILE_BYTES = 64 * 2**20  # tokenizing takes some 40 bytes of memory per byte of text
_TOKENIZE_BATCH = 256
_BINARY = frozenset(map(chr, range(32))) - set("\t\n\v\f\r\x1b")
# A text that the model writes itself is made of documents of at most this length: each step of decoding reads the cache
# whole, so that twice the length costs almost twice the time per token.
_DOCUMENT_TOKENS = 256
_SAMPLE_ROWS = 128
_SAMPLE_CACHE_BYTES = 768 * 2**20


@dataclass(frozen=True)
class Calibration:
    """Token windows `ids` (N, T) int64, with where they came from; `sha256` is that of their little-endian bytes."""

    ids: torch.Tensor
    source: str
    seed: int
    sha256: str

    def record(self) -> CalibrationRecord:
        """What `plan.json` keeps of it."""
        sequences, length_tokens = self.ids.shape
        return CalibrationRecord(self.source, sequences, length_tokens, self.sha256)

    def entry(self) -> Entry:
        """The calibration as an entry of the journal: a text that the model writes itself takes long."""
        return Entry({"ids": self.ids}, {"source": self.source, "seed": self.seed, "sha256": self.sha256})

    @classmethod
    def from_entry(cls, entry: Entry) -> "Calibration":
        """The calibration that an entry of the journal holds."""
        return cls(ids=entry.tensors["ids"], **entry.facts)


def gather(
    spec: str | None,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | Decoder,
    *,
    sequences: int = 128,
    held_out: int = 0,
    length_tokens: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Calibration windows (sequences + held_out, length_tokens) of the text that `spec` names.

    Those that are to be held out (`split`) come last. `progress` counts the tokens that the model has sampled; reading
    a text does not call it.

    Raises:
        EdgepruneError: if the text cannot be had, is not text, or holds fewer tokens than asked for.
    """
    decoder = Decoder.of(model)
    _check_size(decoder.config, sequences, length_tokens)
    wanted = sequences + held_out
    chosen = spec
    if chosen is None:
        chosen = DEFAULT_SPEC if _hub_answers() else SELF_SPEC
    if chosen != SELF_SPEC:
        try:
            documents, source, limit = _open(chosen, wanted * length_tokens)
            tokens = _tokenize(documents, tokenizer, limit)
            _check_length(tokens, source, sequences, held_out, length_tokens)
            return _calibration(_windows(tokens, decoder.config, wanted, length_tokens, seed), source, seed)
        except _HubError as error:
            if spec is not None:
                raise
            logger.warning("%s; the model writes its own calibration text instead", error)
    source = "text that the model wrote itself" + ("" if spec else f" ({DEFAULT_SPEC} could not be reached)")
    if decoder.is_streamed:
        raise EdgepruneError(
            "the model writes its own calibration text only if all of it fits into memory; give a text with "
            "--calibration, or more with --max-memory"
        )
    with decoder.whole() as whole:
        return _calibration(sample(whole, wanted, length_tokens, seed=seed, progress=progress), source, seed)


def split(calibration: Calibration, held_out: int) -> tuple[Calibration, Calibration]:
    """The calibration without its last `held_out` sequences, and those sequences.

    The windows lie in random order, so the last ones are as good a sample as any.

    Raises:
        EdgepruneError: if either part would be empty.
    """
    sequences = len(calibration.ids)
    if not 0 < held_out < sequences:
        raise EdgepruneError(
            f"cannot hold out {held_out} of {sequences} calibration sequences; expected 1 to {sequences - 1}"
        )
    used, held = calibration.ids[:-held_out], calibration.ids[-held_out:]
    return (
        _calibration(used, calibration.source, calibration.seed),
        _calibration(held, calibration.source, calibration.seed),
    )


def _calibration(ids: torch.Tensor, source: str, seed: int) -> Calibration:
    digest = hashlib.sha256(ids.contiguous().numpy().astype("<i8", copy=False).tobytes()).hexdigest()
    return Calibration(ids, source, seed, digest)


def _check_size(config: PreTrainedConfig, sequences: int, length_tokens: int) -> None:
    if sequences < 1 or length_tokens < 2:
        raise EdgepruneError(
            f"calibration of {sequences} x {length_tokens} tokens asked for; expected at least 1 sequence of 2 tokens"
        )
    context_tokens = getattr(config, "max_position_embeddings", None)
    if context_tokens is not None and length_tokens > context_tokens:
        raise EdgepruneError(
            f"calibration length of {length_tokens} tokens is beyond the model's context; give at most {context_tokens}"
        )


# --- texts ------------------------------------------------------------------------------------------------------------


def hash_file(spec: str | None) -> str | None:
    """SHA-256 of the file that a spec names, in hex; None where the text is no file's.

    Raises:
        EdgepruneError: if there is no such file, or it is not to be read.
    """
    if spec is None or spec == SELF_SPEC or spec.startswith(_HUB_PREFIX):
        return None
    return hashlib.sha256(_read_file(spec)).hexdigest()


class _HubError(EdgepruneError):
    """A data set of the hub cannot be had."""


def _open(spec: str, asked_tokens: int) -> tuple[Iterable[str], str, int | None]:
    """Documents of a spec, its source in words, and the number of tokens after which reading stops (None: never)."""
    if spec.startswith(_HUB_PREFIX):
        documents, source = _hub_documents(spec)
        return documents, source, _HUB_TOKENS_PER_ASKED * asked_tokens
    path, text = Path(spec), _read_text(spec)
    documents = jsonl_rows(text, path) if path.suffix.lower() == _ROWS_SUFFIX else [text]
    return documents, f"the file {path.name}", None


def _read_text(spec: str) -> str:
    data = _read_file(spec).removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgepruneError(
            f"calibration file {spec!r} is not UTF-8 text (byte {error.start}); expected plain text"
        ) from None
    if not _BINARY.isdisjoint(text):
        raise EdgepruneError(f"calibration file {spec!r} holds binary data; expected plain UTF-8 text")
    if not text.strip():
        raise EdgepruneError(f"calibration file {spec!r} is empty; expected text")
    return text


def _read_file(spec: str) -> bytes:
    expected = "expected a .txt or .jsonl file, hf:OWNER/NAME[/CONFIG][:SPLIT], or self"
    path = Path(spec)
    try:
        if not path.is_file():
            raise EdgepruneError(f"calibration {spec!r} is no file; {expected}")
        if path.suffix.lower() not in (".txt", _ROWS_SUFFIX):
            raise EdgepruneError(f"calibration file {spec!r} ends with {path.suffix!r}; expected .txt or .jsonl")
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_FILE_BYTES:
            raise EdgepruneError(
                f"calibration file {spec!r} has {size_bytes:,} bytes; give at most {_MAX_FILE_BYTES:,}, a part will do"
            )
        return path.read_bytes()
    except OSError as error:  # a name too long for the system, or a file that is closed to us
        raise EdgepruneError(f"calibration {spec!r} cannot be read ({error.strerror}); {expected}") from error


def _hub_documents(spec: str) -> tuple[Iterable[str], str]:
    """Documents of `hf:OWNER/NAME[/CONFIG][:SPLIT]` and the source in words."""
    name, colon, split_name = spec.removeprefix(_HUB_PREFIX).partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3 or (colon and not split_name):
        raise EdgepruneError(f"calibration {spec!r} is not of the form hf:OWNER/NAME[/CONFIG][:SPLIT]")
    repository, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    split_name = split_name or "train"

    import datasets  # half a second of import that the other sources need not pay for
    from huggingface_hub import constants

    offline = constants.is_offline_mode()
    if not offline and not _hub_answers():
        raise _HubError(
            f"calibration {spec!r}: {constants.ENDPOINT} does not answer; give a text file or self, "
            "or set HF_HUB_OFFLINE=1 if the data set is already in the cache"
        )
    try:
        # Streamed, so that a few thousand tokens of C4 do not fetch all its shards; the cache can only be read whole.
        rows = datasets.load_dataset(repository, config, split=split_name, streaming=not offline)
    except (OSError, ValueError, RuntimeError) as error:
        raise _HubError(f"calibration {spec!r} cannot be loaded: {error}") from None
    documents = _hub_texts(rows, spec)
    source = f"{repository}{f' ({config})' if config else ''}, split {split_name}"
    return (_join_lines(documents) if repository in _LINES_OF_ONE_TEXT else documents), source


def _hub_texts(rows: Iterable[Any], spec: str) -> Iterator[str]:
    try:
        for row in rows:
            text = row.get("text")
            if not isinstance(text, str):
                raise EdgepruneError(f'calibration {spec!r} has no column "text"; its columns are {", ".join(row)}')
            yield text
    except OSError as error:
        raise _HubError(f"calibration {spec!r} broke off: {error}") from None


def _join_lines(lines: Iterable[str], count: int = 1000) -> Iterator[str]:
    """Documents of `count` lines each, joined by an empty line."""
    iterator = iter(lines)
    while chunk := list(itertools.islice(iterator, count)):
        yield "\n\n".join(chunk)


def _hub_answers() -> bool:
    """Whether the hub answers a request within a few seconds.

    The request runs in its own thread because no time limit reaches a name look-up.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong on the way, the hub did not answer
            logger.info("%s does not answer: %s", constants.ENDPOINT, error)
        else:
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> torch.Tensor:
    """Tokens of all documents (L,) int64, each followed by the end-of-text token if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[torch.Tensor] = []
    total = 0
    texts = (document for document in documents if document.strip())
    while batch := list(itertools.islice(texts, _TOKENIZE_BATCH)):
        with blaming(
            "the model's tokenizer fails on the calibration text", "give another text, or fetch its files again"
        ):
            rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in rows:
            parts.append(torch.tensor(ids + end, dtype=torch.int64))
            total += len(ids) + len(end)
        if limit is not None and total >= limit:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _check_length(tokens: torch.Tensor, source: str, sequences: int, held_out: int, length_tokens: int) -> None:
    wanted, available = sequences + held_out, len(tokens) // length_tokens
    if available >= wanted:
        return
    aside = f", {held_out} of them held out for the perplexity," if held_out else ""
    room = available - held_out
    raise EdgepruneError(
        f"calibration text ({source}) has {len(tokens):,} tokens, but {wanted} x {length_tokens} = "
        f"{wanted * length_tokens:,}{aside} are asked for; give more text, "
        + (f"at most --calibration-sequences {room}, " if room > 0 else "")
        + "or fewer --calibration-tokens"
    )


def _windows(
    tokens: torch.Tensor, config: PreTrainedConfig, sequences: int, length_tokens: int, seed: int
) -> torch.Tensor:
    """Random windows (sequences, length_tokens) of the tokens, none overlapping another."""
    available = len(tokens) // length_tokens
    largest, vocabulary = int(tokens.max()), config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise EdgepruneError(
            f"the tokenizer gives token {largest}, but the model knows {vocabulary}; expected the model's own tokenizer"
        )
    generator = torch.Generator().manual_seed(seed)
    slack = len(tokens) - available * length_tokens
    offset = int(torch.randint(slack + 1, (1,), generator=generator))
    grid = tokens[offset : offset + available * length_tokens].view(available, length_tokens)
    return grid[torch.randperm(available, generator=generator)[:sequences]].contiguous()


# --- text that the model writes ---------------------------------------------------------------------------------------


class _FixedLayer(DynamicLayer):
    """Keys and values of one layer in memory taken once: `DynamicLayer` copies all of them at every step."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        self._capacity = capacity
        self._used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all_keys = key_states.new_empty(*key_states.shape[:2], self._capacity, key_states.shape[3])
            self._all_values = value_states.new_empty(*value_states.shape[:2], self._capacity, value_states.shape[3])
        start, self._used = self._used, self._used + key_states.shape[2]
        self._all_keys[:, :, start : self._used] = key_states
        self._all_values[:, :, start : self._used] = value_states
        self.keys, self.values = self._all_keys[:, :, : self._used], self._all_values[:, :, : self._used]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._used


def sample(
    model: PreTrainedModel, sequences: int, length_tokens: int, *, seed: int = 0, progress: Progress | None = None
) -> torch.Tensor:
    """Text that the model writes: (sequences, length_tokens) int64, sampled at temperature 1.

    Every document begins with the begin-of-text token. Where one ends, the next begins in the same row, and is written
    without sight of what came before it: with it, a model soon only repeats the shortest document. The same seed gives
    the same text on the same machine.

    Raises:
        EdgepruneError: if the model has no token to begin with, or its output is not finite.
    """
    begin, ends = _boundaries(model)
    pieces = -(-length_tokens // _DOCUMENT_TOKENS)
    piece_tokens = -(-length_tokens // pieces)
    rows = sequences * pieces
    writer = copy_in(model, fastest_dtype()).eval()
    batch = min(_SAMPLE_ROWS, rows, max(1, _SAMPLE_CACHE_BYTES // _cache_bytes_per_row(writer, piece_tokens)))
    generator = torch.Generator().manual_seed(seed)
    done: list[torch.Tensor] = []
    for start in range(0, rows, batch):
        count = min(batch, rows - start)

        def report(step: int, start: int = start, count: int = count) -> None:
            if progress is not None:
                progress(start * piece_tokens + step * count, rows * piece_tokens)

        done.append(_sample_rows(writer, count, piece_tokens, begin, ends, generator, report))
    return torch.cat(done).view(sequences, pieces * piece_tokens)[:, :length_tokens].contiguous()


def _boundaries(model: PreTrainedModel) -> tuple[int, torch.Tensor]:
    """The token a document begins with, and those that end one (E,) int64."""
    generation = model.generation_config
    begin = model.config.bos_token_id if generation is None else generation.bos_token_id
    ends = model.config.eos_token_id if generation is None else generation.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if begin is None:
        begin = next(iter(ends), None)
    if begin is None:
        raise EdgepruneError(
            "calibration 'self' needs a model with a begin- or end-of-text token; give a text file instead"
        )
    return int(begin), torch.tensor(ends, dtype=torch.int64)


def _cache_bytes_per_row(model: PreTrainedModel, length_tokens: int) -> int:
    config = model.config.get_text_config()
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers: int = config.num_hidden_layers
    return 2 * layers * kv_heads * head_dim * length_tokens * model.dtype.itemsize


@torch.inference_mode()
def _sample_rows(
    model: PreTrainedModel,
    rows: int,
    length_tokens: int,
    begin: int,
    ends: torch.Tensor,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> torch.Tensor:
    """One batch of sampled rows (rows, length_tokens) int64, decoded step by step with a KV cache."""
    cache = Cache(layers=[_FixedLayer(length_tokens) for _ in range(model.config.num_hidden_layers)])
    ids = torch.full((rows, length_tokens), begin, dtype=torch.int64)
    starts = torch.zeros((rows, 1), dtype=torch.int64)  # where the document that a row is writing began
    places = torch.arange(length_tokens)
    for step in range(1, length_tokens):
        last = ids[:, step - 1 : step]
        logits = model(
            input_ids=last,
            attention_mask=(places[:step] >= starts).long(),
            position_ids=step - 1 - starts,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        ended = torch.isin(last, ends) & (last != begin)  # where one token is both, it has begun the next already
        ids[:, step : step + 1] = torch.where(ended, begin, _draw(logits, generator))
        starts = torch.where(ended, step, starts)
        report(step + 1)
    return ids


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token per row (B, 1) int64 from logits (B, V), by inverting the cumulative distribution.

    `torch.multinomial` draws a random number for every token of the vocabulary, which takes longer than the model does.
    """
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise EdgepruneError("the model's output is not finite, so it cannot write calibration text; check its weights")
    points = torch.rand(len(logits), 1, generator=generator) * total
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[1] - 1)
