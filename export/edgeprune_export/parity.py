"""The gate: a graph in ONNX Runtime, as it ships, must compute what the torch model computes, or no bundle is written.

Every way a graph is used is compared on real text: prefill of one token, of an odd number and of many; cached decoding
from several split points, one token and several at a time; batches of unequal rows, padded on each side that the bundle
claims, and decoded after; and the greedy continuation. The torch model sees every sequence alone, unpadded and without
a cache, so that a mistake in masks, positions or cache cannot be made on both sides alike.
"""

from collections.abc import Callable, Iterator, Sequence
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
from edgeprune_runtime.session import ORT_ERRORS, PREFILL_CHUNK_TOKENS, make_session

# float32 sums in another order differ by 1e-4 of a logit on real models; any real mistake by far more.
DEFAULT_TOLERANCE = 1e-3

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


@dataclass(frozen=True)
class ParityResult:
    """How far a graph is from its torch model, over all `positions` compared.

    `argmax_agreement` is the share of positions with the same most likely token. `argmax_errors` counts those that
    differ although torch's two best logits are further apart than the tolerance can explain. `greedy_agreement` is the
    length of the common beginning of the two greedy continuations, of `greedy_tokens`. `checks` holds the largest error
    of each way of use.
    """

    tolerance: float
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
        padding: The sides on which the bundle claims to take padding.
        threads: Threads of ONNX Runtime; None takes all that are usable.
        on_check: Hears the share of the comparison that is done.

    Raises:
        GateError: if the graph does not load or run with the model's shapes, or differs from the model.
    """
    comparison = _Comparison(tolerance)
    runner = Runner(model, graph, threads)
    length = min(LONG_TOKENS, context_tokens(model.config))
    texts = windows(sequences, count=len(BATCH_LENGTHS), tokens=length)
    try:
        for name, expected, found in _checks(model, runner, texts, padding):
            comparison.add(name, expected, found)
            on_check(min(1.0, comparison.positions / _expected_positions(length, padding)))
        agreement, tokens = _greedy(model, runner, texts[0][:GREEDY_PROMPT_TOKENS], tolerance)
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise GateError(
            f"parity of {graph.name} failed: ONNX Runtime cannot run it with the model's shapes ({reason})"
        ) from error
    result = comparison.result(agreement, tokens)
    _judge(graph, result)
    return result


def _judge(graph: Path, result: ParityResult) -> None:
    # Written so that a NaN fails.
    close = all(error <= result.tolerance for error in result.checks.values())
    if close and result.argmax_errors == 0 and result.greedy_agreement == result.greedy_tokens:
        return
    worst = max(result.checks, key=lambda name: np.nan_to_num(result.checks[name], nan=np.inf))
    raise GateError(
        f"parity of {graph.name} failed: logits differ from the torch model by up to {result.max_abs_error:.3g} "
        f"(tolerance {result.tolerance:g}; worst in {worst!r}), same best token at {result.argmax_agreement:.1%} of "
        f"{result.positions} positions, mean KL {result.mean_kl:.3g}, greedy {result.greedy_agreement} of "
        f"{result.greedy_tokens} tokens; the graph must not be used"
    )


def _checks(
    model: PreTrainedModel, runner: "Runner", texts: list[list[int]], padding: Padding
) -> Iterator[tuple[str, Logits, Logits]]:
    """(name, expected (P, V), found (P, V)) of each way of use but greedy decoding."""
    text = texts[0]
    expected = logits_of(model, text)
    for length in (1, min(ODD_TOKENS, len(text) - 1), len(text) - 1):
        found, state = runner.prefill([text[:length]])
        yield f"prefill {length}", expected[:length], found[0]
        yield (
            f"decode after {length}",
            expected[length : length + 1],
            runner.step([text[length : length + 1]], state)[0][0],
        )
    for split in SPLITS:
        if split + DECODE_TOKENS + CHUNK_TOKENS > len(text):
            continue
        _, state = runner.prefill([text[:split]])
        start = split
        for width in (*[1] * DECODE_TOKENS, CHUNK_TOKENS):
            step = slice(start, start + width)
            found, state = runner.step([text[step]], state)
            yield f"decode after {split}", expected[step], found[0]
            start += width
    rows = [row[: length + BATCH_DECODE_TOKENS] for row, length in zip(texts, BATCH_LENGTHS, strict=True)]
    references = [logits_of(model, row) for row in rows]
    sides: tuple[Side, ...] = ("left", "right", "mixed") if padding == "both" else ("right",)
    for side in sides:
        yield from _check_batch(runner, rows, references, side)


def _check_batch(
    runner: "Runner", rows: list[list[int]], references: list[Logits], side: Side
) -> Iterator[tuple[str, Logits, Logits]]:
    prompts = [row[:-BATCH_DECODE_TOKENS] for row in rows]
    found, state = runner.prefill(prompts, side)
    for index, prompt in enumerate(prompts):
        real = found[index][state.mask[index] == 1]
        yield f"batch padded {side}", references[index][: len(prompt)], real
    for step in range(BATCH_DECODE_TOKENS):
        places = [slice(len(prompt) + step, len(prompt) + step + 1) for prompt in prompts]
        found, state = runner.step([row[place] for row, place in zip(rows, places, strict=True)], state)
        for index, place in enumerate(places):
            yield f"decode padded {side}", references[index][place], found[index]


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


def _expected_positions(length: int, padding: Padding) -> int:
    """About how many positions `_checks` compares; for showing progress."""
    sides = 3 if padding == "both" else 1
    decoded = len(SPLITS) * (DECODE_TOKENS + CHUNK_TOKENS)
    batches = sides * (sum(BATCH_LENGTHS) + len(BATCH_LENGTHS) * BATCH_DECODE_TOKENS)
    return 1 + ODD_TOKENS + length + decoded + batches


class _Comparison:
    """Figures over all positions, gathered check by check so that no two long rows of logits are held at once."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._checks: dict[str, float] = {}
        self._divergences: list[NDArray[np.float64]] = []
        self.positions = 0
        self._same = 0
        self._errors = 0

    def add(self, name: str, expected: Logits, found: Logits) -> None:
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
        divergences = np.concatenate(self._divergences)
        return ParityResult(
            tolerance=self._tolerance,
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


@dataclass(frozen=True)
class State:
    """What a batch has left behind: which slots are real, (B, slots) int64, and the KV cache."""

    mask: Mask
    cache: list[NDArray[np.float32]]


class Runner:
    """A graph in ONNX Runtime, fed with the shapes that the torch model has (not with those the graph claims)."""

    def __init__(self, model: PreTrainedModel, graph: Path, threads: int | None) -> None:
        self._kv_shapes = kv_shapes(model)
        try:
            self._session: InferenceSession = make_session(graph, threads=threads)
        except EdgepruneError as error:
            raise GateError(f"parity of {graph.name} failed: {error}") from error
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

    def prefill(self, rows: Sequence[Sequence[int]], side: Side = "left") -> tuple[Logits, State]:
        """Logits (B, T, V) of a batch of prompts, and what they leave behind."""
        width = max(map(len, rows))
        ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
        for index, row in enumerate(rows):
            free = width - len(row)
            start = {"left": free, "right": 0, "mixed": free // 2}[side]
            ids[index, start : start + len(row)] = row
            mask[index, start : start + len(row)] = 1
        empty = [
            np.zeros((len(rows), heads, 0, head_dim), np.float32)
            for heads, head_dim in self._kv_shapes
            for _ in interface.PARTS
        ]
        return self._run(ids, mask, empty)

    def step(self, rows: Sequence[Sequence[int]], state: State) -> tuple[Logits, State]:
        """Logits (B, T, V) of the next tokens of a batch, and what they leave behind."""
        ids = np.array(rows, np.int64)
        mask = np.concatenate([state.mask, np.ones_like(ids)], axis=1)
        return self._run(ids, mask, state.cache)

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """The likeliest continuation of a prompt, by cached decoding."""
        found, state = self.prefill([prompt])
        chosen: list[int] = []
        while len(chosen) < tokens:
            chosen.append(int(found[0, -1].argmax()))
            found, state = self.step([chosen[-1:]], state)
        return chosen

    def _run(self, ids: Mask, mask: Mask, cache: list[NDArray[np.float32]]) -> tuple[Logits, State]:
        feeds = {"input_ids": ids, "attention_mask": mask, **dict(zip(self._past_names, cache, strict=True))}
        # Only dense tensors come out of these graphs; ONNX Runtime's own type allows for every kind of value.
        logits, *presents = cast("list[Logits]", self._session.run(self._outputs, feeds))
        return logits, State(mask, presents)
