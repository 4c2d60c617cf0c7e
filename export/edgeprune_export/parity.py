"""The gate: a graph in ONNX Runtime, as it ships, must compute what the torch model computes, or no bundle is written.

Every way a graph is used is compared on real text: prefill of one token, of an odd number and of many; cached decoding
from several split points, one token and several at a time; batches of unequal rows, padded on each side that the bundle
claims, and decoded after; and the greedy continuation. The torch model sees every sequence alone, unpadded and without
a cache, so that a mistake in masks, positions or cache cannot be made on both sides alike.

All of it but the greedy continuation is known before anything runs: a list of `Call`s. Whoever cannot hold the whole
model makes them block by block (`edgeprune_export.block_gate`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from transformers import PreTrainedModel

from edgeprune_export import interface
from edgeprune_export.positions import context_tokens
from edgeprune_export.reference import Logits, kv_shapes, logits_of
from edgeprune_export.sample_text import windows
from edgeprune_runtime.bundle import Padding
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.session import LOGITS_TO_KEEP, ORT_ERRORS, PREFILL_CHUNK_TOKENS, keeps_logits, make_session

# float32 sums in another order differ by 1e-4 of a logit on real models; any real mistake by far more.
DEFAULT_TOLERANCE = 1e-3
DEFAULT_MAX_KL = 1e-5

DECODE_TOKENS = 6
CHUNK_TOKENS = 5
ODD_TOKENS = 37
# The runtime prefills long prompts in pieces: one of them, and what follows it, is a case of its own.
SPLITS = (1, 24, 61, PREFILL_CHUNK_TOKENS)
LONG_TOKENS = PREFILL_CHUNK_TOKENS + DECODE_TOKENS + CHUNK_TOKENS
BATCH_LENGTHS = (29, 1, 13, 20)
BATCH_DECODE_TOKENS = 3
GREEDY_PROMPT_TOKENS = 24
GREEDY_TOKENS = 16

# Softmax in float64 over the whole vocabulary: so many rows at a time.
_KL_ROWS = 32

Side = Literal["left", "right", "mixed"]
Mask = NDArray[np.int64]
Cache = NDArray[np.float32 | np.float16]


@dataclass(frozen=True)
class ParityResult:
    """How far a graph is from its torch model, over all `positions` compared.

    `argmax_agreement` is the share of positions with the same most likely token. `argmax_errors` counts those that
    differ although torch's two best logits are further apart than the tolerance can explain. `greedy_agreement` is the
    length of the common beginning of the two greedy continuations, of `greedy_tokens`. `checks` holds the largest error
    of each way of use.
    """

    tolerance: float
    max_kl: float
    max_abs_error: float
    mean_kl: float
    p99_kl: float
    argmax_agreement: float
    argmax_errors: int
    greedy_agreement: int
    greedy_tokens: int
    positions: int
    checks: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """The result as plain values."""
        return asdict(self)


def check_parity(
    model: PreTrainedModel,
    graph: Path,
    sequences: Sequence[Sequence[int]],
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    max_kl: float = DEFAULT_MAX_KL,
    padding: Padding = "both",
    threads: int | None = None,
    on_check: Callable[[float], None] = lambda share: None,
) -> ParityResult:
    """Compare a graph with its torch model on token sequences of real text.

    Args:
        model: The float32 model in eval mode.
        graph: The ONNX file, its external data beside it.
        sequences: Token ids; together at least a few hundred, each at least two.
        tolerance: Largest absolute error of a logit that counts as equal.
        max_kl: Largest mean KL divergence, in nats, that counts as equal: where operators round, single logits may move
            far, and it is this that tells rounding from a mistake.
        padding: The sides on which the bundle claims to take padding.
        threads: Threads of ONNX Runtime; None takes all that are usable.
        on_check: Hears the share of the comparison that is done.

    Raises:
        GateError: if the graph does not load or run with the model's shapes, or differs from the model.
    """
    runner = Runner(model, graph, threads)
    texts = parity_texts(sequences, context_tokens(model.config))
    calls = parity_calls(texts, padding, keeps_logits=runner.keeps_logits)
    comparison = Comparison(tolerance, max_kl)
    references = [logits_of(model, text) for text in texts]
    try:
        for index, (call, logits) in enumerate(zip(calls, runner.run_all(calls), strict=True)):
            comparison.add_call(call, references, logits)
            on_check((index + 1) / len(calls))
        agreement, tokens = _greedy(model, runner, texts[0][:GREEDY_PROMPT_TOKENS], tolerance)
    except ORT_ERRORS as error:
        raise shapes_error(graph, error) from error
    result = comparison.result(agreement, tokens)
    judge(graph, result)
    return result


def shapes_error(graph: Path, error: Exception) -> GateError:
    """What to say of a graph that does not run."""
    reason = " ".join(str(error).split())[:300]
    return GateError(f"parity of {graph.name} failed: ONNX Runtime cannot run it with the model's shapes ({reason})")


def judge(graph: Path, result: ParityResult) -> None:
    """Let a result pass, or not.

    Raises:
        GateError: saying by how much, and where most.
    """
    # Written so that a NaN fails.
    close = all(error <= result.tolerance for error in result.checks.values()) and result.mean_kl <= result.max_kl
    if close and result.argmax_errors == 0 and result.greedy_agreement == result.greedy_tokens:
        return
    worst = max(result.checks, key=lambda name: np.nan_to_num(result.checks[name], nan=np.inf))
    raise GateError(
        f"parity of {graph.name} failed: logits differ from the torch model by up to {result.max_abs_error:.3g} "
        f"(tolerance {result.tolerance:g}; worst in {worst!r}), same best token at {result.argmax_agreement:.1%} of "
        f"{result.positions} positions, mean KL {result.mean_kl:.3g} (at most {result.max_kl:g}), greedy "
        f"{result.greedy_agreement} of "
        f"{result.greedy_tokens} tokens; the graph must not be used"
    )


@dataclass(frozen=True)
class Place:
    """A stretch of what a call gives, and of the text that it is compared with."""

    row: int
    columns: slice
    text: int
    positions: slice


@dataclass(frozen=True)
class Call:
    """One run of a graph: `ids` (B, T) with `mask` (B, slots), behind the cache of an earlier call of the list, if any.

    `name` says which way of use it is. What it gives is compared at `places`. With `last` it asks for the logits of the
    last column alone, (B, 1, V).
    """

    name: str
    ids: Mask
    mask: Mask
    before: int | None
    places: tuple[Place, ...]
    last: bool = False

    @property
    def switches(self) -> dict[str, Mask]:
        """What the call overrides."""
        return {LOGITS_TO_KEEP: np.array([1])} if self.last else {}


def parity_texts(sequences: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """The texts that are compared: a long one, and the rows of the batches.

    Raises:
        EdgepruneError: if the sequences hold too few tokens.
    """
    texts = windows(sequences, count=len(BATCH_LENGTHS), tokens=min(LONG_TOKENS, context))
    rows = [row[: length + BATCH_DECODE_TOKENS] for row, length in zip(texts, BATCH_LENGTHS, strict=True)]
    return [texts[0], *rows]


def parity_calls(texts: Sequence[Sequence[int]], padding: Padding, *, keeps_logits: bool) -> list[Call]:
    """Every way of use but greedy decoding, on `parity_texts`.

    `keeps_logits`: the graph can be asked for the logits of the last column alone.
    """
    calls: list[Call] = []
    text, *rows = texts
    for length in (1, min(ODD_TOKENS, len(text) - 1), len(text) - 1):
        add_prefill(calls, f"prefill {length}", text[:length])
        _add_step(calls, f"decode after {length}", text, length, 1)
    for split in SPLITS:
        if split + DECODE_TOKENS + CHUNK_TOKENS > len(text):
            continue
        add_prefill(calls, f"prefill {split}", text[:split])
        start = split
        for width in (*[1] * DECODE_TOKENS, CHUNK_TOKENS):
            _add_step(calls, f"decode after {split}", text, start, width)
            start += width
    sides: tuple[Side, ...] = ("left", "right", "mixed") if padding == "both" else ("right",)
    for side in sides:
        _add_batch(calls, rows, side)
    if keeps_logits:
        ids = np.array([text], np.int64)
        end = slice(len(text) - 1, len(text))
        calls.append(Call("last logits", ids, np.ones_like(ids), None, (Place(0, slice(0, 1), 0, end),), last=True))
    return calls


def add_prefill(calls: list[Call], name: str, ids: Sequence[int], text: int = 0) -> None:
    """Add the call that reads the beginning of a text."""
    row = np.array([ids], np.int64)
    everything = slice(0, len(ids))
    calls.append(Call(name, row, np.ones_like(row), None, (Place(0, everything, text, everything),)))


def _add_step(calls: list[Call], name: str, text: Sequence[int], start: int, width: int) -> None:
    before = len(calls) - 1
    ids = np.array([text[start : start + width]], np.int64)
    mask = np.concatenate([calls[before].mask, np.ones_like(ids)], axis=1)
    place = Place(0, slice(0, width), 0, slice(start, start + width))
    calls.append(Call(name, ids, mask, before, (place,)))


def _add_batch(calls: list[Call], rows: Sequence[Sequence[int]], side: Side) -> None:
    """Prompts of unequal lengths, padded on a side, and tokens decoded after them."""
    lengths = [len(row) - BATCH_DECODE_TOKENS for row in rows]
    width = max(lengths)
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    places = []
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        free = width - length
        begin = {"left": free, "right": 0, "mixed": free // 2}[side]
        ids[index, begin : begin + length] = row[:length]
        mask[index, begin : begin + length] = 1
        places.append(Place(index, slice(begin, begin + length), 1 + index, slice(0, length)))
    calls.append(Call(f"batch padded {side}", ids, mask, None, tuple(places)))
    for step in range(BATCH_DECODE_TOKENS):
        ids = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)], np.int64)
        mask = np.concatenate([calls[-1].mask, np.ones_like(ids)], axis=1)
        places = [
            Place(index, slice(0, 1), 1 + index, slice(length + step, length + step + 1))
            for index, length in enumerate(lengths)
        ]
        calls.append(Call(f"decode padded {side}", ids, mask, len(calls) - 1, tuple(places)))


def _greedy(model: PreTrainedModel, runner: "Runner", prompt: list[int], tolerance: float) -> tuple[int, int]:
    """Length of the common greedy continuation, and its full length; ends early, and well, at a tie.

    The graph decodes; the torch model reads what it wrote in one pass. As long as each token is also torch's best, what
    came before it is torch's own continuation too.
    """
    chosen = runner.greedy(prompt, GREEDY_TOKENS)
    rows = logits_of(model, prompt + chosen)[len(prompt) - 1 : -1]
    for step, (token, row) in enumerate(zip(chosen, rows, strict=True)):
        if int(row.argmax()) != token:
            best, second = np.partition(row, -2)[[-1, -2]]
            is_tie = bool(best - second <= 2 * tolerance)
            return step, step if is_tie else GREEDY_TOKENS
    return GREEDY_TOKENS, GREEDY_TOKENS


class Comparison:
    """Figures over all positions, gathered check by check so that no two long rows of logits are held at once."""

    def __init__(self, tolerance: float, max_kl: float = DEFAULT_MAX_KL) -> None:
        self._tolerance = tolerance
        self._max_kl = max_kl
        self._checks: dict[str, float] = {}
        self._divergences: list[NDArray[np.float64]] = []
        self.positions = 0
        self._same = 0
        self._errors = 0

    def add_call(self, call: Call, references: Sequence[Logits], found: Logits) -> None:
        """Add what a call gave, (B, T, V); `references` (T, V) are those of the texts."""
        for place in call.places:
            self.add(call.name, references[place.text][place.positions], found[place.row, place.columns])

    def add(self, name: str, expected: Logits, found: Logits) -> None:
        """Add logits (P, V) of both sides."""
        # Both maxima keep a NaN, and the gate fails on it.
        error = np.abs(expected - found).max()
        self._checks[name] = float(np.maximum(error, self._checks.get(name, 0.0)))
        self._divergences.append(kl_divergence(expected, found))
        self.positions += len(expected)
        same = expected.argmax(-1) == found.argmax(-1)
        self._same += int(same.sum())
        best_two = np.partition(expected[~same], -2, axis=-1)[:, -2:]
        self._errors += int((best_two[:, 1] - best_two[:, 0] > 2 * self._tolerance).sum())

    def result(self, greedy_agreement: int, greedy_tokens: int) -> ParityResult:
        """The figures of everything that was added."""
        divergences = np.concatenate(self._divergences)
        return ParityResult(
            tolerance=self._tolerance,
            max_kl=self._max_kl,
            max_abs_error=float(np.max(list(self._checks.values()))),
            mean_kl=float(divergences.mean()),
            p99_kl=float(np.quantile(divergences, 0.99)),
            argmax_agreement=self._same / self.positions,
            argmax_errors=self._errors,
            greedy_agreement=greedy_agreement,
            greedy_tokens=greedy_tokens,
            positions=self.positions,
            checks=self._checks,
        )


def kl_divergence(expected: Logits, found: Logits) -> NDArray[np.float64]:
    """KL(torch || graph) of the next-token distributions at each position, in nats."""
    values = []
    for start in range(0, len(expected), _KL_ROWS):
        p, q = (log_softmax(rows[start : start + _KL_ROWS]) for rows in (expected, found))
        values.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(values)


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Logarithms of the probabilities (P, V)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


class Runner:
    """A graph in ONNX Runtime, fed with the shapes that the torch model has (not with those the graph claims)."""

    def __init__(self, model: PreTrainedModel, graph: Path, threads: int | None) -> None:
        self._kv_shapes = kv_shapes(model)
        try:
            self._session: InferenceSession = make_session(graph, threads=threads)
        except EdgepruneError as error:
            raise GateError(f"parity of {graph.name} failed: {error}") from error
        self.keeps_logits = keeps_logits(self._session)
        self._cache_dtype = np.float16 if _keeps_half(self._session) else np.float32
        self._past_names = [
            interface.past_name(layer, part) for layer in range(len(self._kv_shapes)) for part in interface.PARTS
        ]
        self._outputs = ["logits"] + [
            interface.present_name(layer, part) for layer in range(len(self._kv_shapes)) for part in interface.PARTS
        ]
        wanted = {"input_ids", "attention_mask", *self._past_names}
        if difference := wanted ^ {node.name for node in self._session.get_inputs()}:
            raise GateError(
                f"parity of {graph.name} failed: its inputs differ from the contract in {min(difference)!r}"
            )

    def run_all(self, calls: Sequence[Call]) -> Iterator[Logits]:
        """Logits (B, T, V) of each call, in order."""
        last_reader = {call.before: index for index, call in enumerate(calls)}
        caches: dict[int, Sequence[Cache]] = {}
        for index, call in enumerate(calls):
            cache = self._empty(len(call.ids)) if call.before is None else caches[call.before]
            logits, caches[index] = self._run(call.ids, call.mask, cache, call.switches)
            for name in [name for name in caches if last_reader.get(name, -1) <= index]:
                del caches[name]
            yield logits

    def prefill(self, ids: Sequence[int]) -> tuple[Logits, Sequence[Cache]]:
        """Logits (T, V) of a prompt, and the cache that it leaves behind."""
        row = np.array([ids], np.int64)
        logits, cache = self._run(row, np.ones_like(row), self._empty(1))
        return logits[0], cache

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """The likeliest continuation of a prompt, by cached decoding."""
        found, cache = self.prefill(prompt)
        chosen: list[int] = []
        while len(chosen) < tokens:
            chosen.append(int(found[-1].argmax()))
            mask = np.ones((1, len(prompt) + len(chosen)), np.int64)
            (found,), cache = self._run(np.array([chosen[-1:]], np.int64), mask, cache)
        return chosen

    def _empty(self, batch: int) -> Sequence[Cache]:
        return [
            np.zeros((batch, heads, 0, head_dim), self._cache_dtype)
            for heads, head_dim in self._kv_shapes
            for _ in interface.PARTS
        ]

    def _run(
        self, ids: Mask, mask: Mask, cache: Sequence[Cache], switches: Mapping[str, Mask] | None = None
    ) -> tuple[Logits, Sequence[Cache]]:
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            **dict(zip(self._past_names, cache, strict=True)),
            **(switches or {}),
        }
        # Only dense tensors come out of these graphs; ONNX Runtime's own type allows for every kind of value.
        logits, *presents = cast("list[Logits]", self._session.run(self._outputs, feeds))
        return logits, presents


def _keeps_half(session: InferenceSession) -> bool:
    return any(node.type == "tensor(float16)" for node in session.get_inputs())
