"""How far a variant with rounded weights is from its float32 model: the price of its precision, measured on text.

Equality of a graph with a torch model of the same rounded weights is the business of `parity`. What is asked here is
whether those weights are good enough to be used, and the answer goes into the manifest.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from edgeprune_export.parity import GREEDY_PROMPT_TOKENS, GREEDY_TOKENS, Runner, kl_divergence, log_softmax
from edgeprune_export.positions import context_tokens
from edgeprune_export.quantize import Precision
from edgeprune_export.reference import logits_of
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
    share of greedy continuations of `greedy_tokens` tokens that are not the same.
    """

    perplexity: float
    perplexity_ratio: float
    argmax_agreement: float
    mean_kl: float
    greedy_flips: float
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
        FidelityError: if perplexity or agreement are worse than the precision allows.
    """
    runner = Runner(model, graph, None)
    tokens = min(WINDOW_TOKENS, context_tokens(model.config) - GREEDY_TOKENS)
    nats, divergences, same, flips = [], [], [], []
    for text in windows(sequences, count=WINDOWS, tokens=tokens):
        expected, (found, _) = logits_of(model, text), runner.prefill([text])
        nats.append([_nats(logits, text) for logits in (expected, found[0])])
        divergences.append(kl_divergence(expected, found[0]))
        same.append(expected.argmax(-1) == found[0].argmax(-1))
        flips.append(_is_flipped(model, runner, text[:GREEDY_PROMPT_TOKENS]))
    before, after = np.concatenate(nats, axis=1).mean(1)
    fidelity = Fidelity(
        perplexity=float(np.exp(after)),
        perplexity_ratio=float(np.exp(after - before)),
        argmax_agreement=float(np.concatenate(same).mean()),
        mean_kl=float(np.concatenate(divergences).mean()),
        greedy_flips=float(np.mean(flips)),
        greedy_tokens=GREEDY_TOKENS,
        positions=sum(map(len, same)),
    )
    # written so that a NaN fails
    is_good = fidelity.perplexity_ratio <= precision.max_perplexity_ratio
    if is_good and fidelity.argmax_agreement >= precision.min_argmax_agreement:
        return fidelity
    raise FidelityError(
        f"{precision.name} loses too much: {fidelity.perplexity_ratio:.3f} times the perplexity of float32 (at most "
        f"{precision.max_perplexity_ratio:g} allowed), the same likeliest token at {fidelity.argmax_agreement:.1%} of "
        f"{fidelity.positions} positions (at least {precision.min_argmax_agreement:.0%} wanted); choose another "
        "precision or a smaller --block-size"
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
