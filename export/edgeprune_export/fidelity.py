"""How far a variant with rounded weights is from its float32 model: the price of its precision, measured on text.

Equality of a graph with a torch model of the same rounded weights is the business of `parity`. What is asked here is
whether those weights are good enough to be used, and the answer goes into the manifest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from edgeprune_export.parity import GREEDY_PROMPT_TOKENS, GREEDY_TOKENS, Runner, kl_divergence, log_softmax
from edgeprune_export.positions import context_tokens
from edgeprune_export.quantize import Precision
from edgeprune_export.reference import Logits, logits_of
from edgeprune_export.sample_text import windows
from edgeprune_runtime.errors import GateError

WINDOWS, WINDOW_TOKENS = 4, 256
"""Of the text, at most; the model's context may hold less."""


class FidelityError(GateError):
    """Rounded weights lose too much; the graph itself may be right."""


@dataclass(frozen=True)
class Fidelity:
    """A variant against its float32 model, over all `positions` compared.

    `argmax_agreement` is the share of positions with the same likeliest token, `mean_kl` is in nats, `greedy_flips` the
    share of greedy continuations of `greedy_tokens` tokens that are not the same; None where none was made.
    """

    perplexity: float
    perplexity_ratio: float
    argmax_agreement: float
    mean_kl: float
    greedy_flips: float | None
    greedy_tokens: int
    positions: int

    def to_dict(self) -> dict[str, object]:
        """The result as plain values."""
        return asdict(self)


def check_fidelity(
    model: PreTrainedModel, graph: Path, sequences: Sequence[Sequence[int]], precision: Precision
) -> Fidelity:
    """Compare the graph of a precision with the float32 model on token sequences of real text.

    Raises:
        FidelityError: if perplexity, agreement or greedy continuations are worse than the precision allows.
    """
    runner = Runner(model, graph, None)
    texts = fidelity_texts(sequences, context_tokens(model.config))
    pairs = ((logits_of(model, text), runner.prefill(text)[0]) for text in texts)
    flips = [_is_flipped(model, runner, text[:GREEDY_PROMPT_TOKENS]) for text in texts]
    return judge(measure(texts, pairs, flips), precision)


def fidelity_texts(sequences: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """The texts that are compared.

    Raises:
        EdgepruneError: if the sequences hold too few tokens.
    """
    return windows(sequences, count=WINDOWS, tokens=min(WINDOW_TOKENS, context - GREEDY_TOKENS))


def measure(
    texts: Sequence[Sequence[int]], pairs: Iterable[tuple[Logits, Logits]], flips: Sequence[bool] = ()
) -> Fidelity:
    """Compare logits (T, V) of the float32 model and of the graph, for each text; `flips` are those of the greedy."""
    nats, divergences, same = [], [], []
    for text, (expected, found) in zip(texts, pairs, strict=True):
        nats.append([_nats(logits, text) for logits in (expected, found)])
        divergences.append(kl_divergence(expected, found))
        same.append(expected.argmax(-1) == found.argmax(-1))
    before, after = np.concatenate(nats, axis=1).mean(1)
    return Fidelity(
        perplexity=float(np.exp(after)),
        perplexity_ratio=float(np.exp(after - before)),
        argmax_agreement=float(np.concatenate(same).mean()),
        mean_kl=float(np.concatenate(divergences).mean()),
        greedy_flips=float(np.mean(flips)) if flips else None,
        greedy_tokens=GREEDY_TOKENS if flips else 0,
        positions=sum(map(len, same)),
    )


def judge(fidelity: Fidelity, precision: Precision) -> Fidelity:
    """Let a result pass, or not.

    Raises:
        FidelityError: saying what was lost.
    """
    flips = fidelity.greedy_flips
    # written so that a NaN fails
    is_good = fidelity.perplexity_ratio <= precision.max_perplexity_ratio
    is_good = is_good and fidelity.argmax_agreement >= precision.min_argmax_agreement
    if is_good and (flips is None or flips <= precision.max_greedy_flips):
        return fidelity
    allowed = f"(at most {precision.max_greedy_flips:.0%} allowed)"
    greedy = "" if flips is None else f", another greedy continuation of {flips:.0%} of the texts {allowed}"
    raise FidelityError(
        f"{precision.name} loses too much: {fidelity.perplexity_ratio:.3f} times the perplexity of float32 (at most "
        f"{precision.max_perplexity_ratio:g} allowed), the same likeliest token at {fidelity.argmax_agreement:.1%} of "
        f"{fidelity.positions} positions (at least {precision.min_argmax_agreement:.0%} wanted){greedy}; choose "
        "another precision or a smaller --block-size"
    )


def _nats(logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]], ids: Sequence[int]) -> list[float]:
    """Loss in nats of each token but the first."""
    rows = log_softmax(logits[:-1])
    return [-float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]


def _is_flipped(model: PreTrainedModel, runner: Runner, prompt: list[int]) -> bool:
    """Whether the greedy continuation is another than the float32 model's."""
    chosen = runner.greedy(prompt, GREEDY_TOKENS)
    rows = logits_of(model, prompt + chosen)[len(prompt) - 1 : -1]
    return any(int(row.argmax()) != token for token, row in zip(chosen, rows, strict=True))
