"""Perplexity through ONNX Runtime, by the convention of GPTQ, SparseGPT and Wanda.

The text is tokenized once and read in windows. With the stride equal to the window (the default) windows do not overlap
and each predicts its own tokens but the first. A smaller stride gives every token after the first window at least
`window - stride` tokens of context: windows overlap and only the tokens not yet scored count. A tail shorter than a
window is left out, as in the papers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Cell, Report, Table
from edgeprune_runtime.session import Decoder, Ids, Logits

# Positions turned to float64 at once: 32 x a vocabulary of 150,000 is 38 MB.
_CHUNK_POSITIONS = 32
Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with all that names it.

    `nll` is the mean negative log-likelihood of a scored token, in nats; `window_nll` that of each window, so that two
    models can be compared window by window.
    """

    perplexity: float
    nll: float
    scored_tokens: int
    windows: int
    window_tokens: int
    stride_tokens: int
    window_nll: tuple[float, ...]
    text_hash: str
    joining: str


def measure_perplexity(
    decoder: Decoder,
    ids: Sequence[int] | Ids,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    text_hash: str = "",
    joining: str = "",
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of token ids (N,) in windows of `window` tokens every `stride` tokens (None: the window).

    Raises:
        EdgepruneError: if the window does not fit the model's context or the text, or the logits are not finite.
    """
    tokens = np.asarray(ids, np.int64)
    stride = window if stride is None else stride
    if not 2 <= window <= decoder.manifest.context_tokens:
        raise EdgepruneError(
            f"window is {window}; 2..{decoder.manifest.context_tokens} (the model's context) was expected"
        )
    if not 1 <= stride <= window:
        raise EdgepruneError(f"stride is {stride}; 1..{window} (the window) was expected")
    if max_windows is not None and max_windows < 1:
        raise EdgepruneError(f"max-windows is {max_windows}; at least 1 was expected")
    if len(tokens) < window:
        raise EdgepruneError(
            f"the text has {len(tokens)} tokens, less than one window of {window}; give a smaller --window"
        )
    starts = range(0, len(tokens) - window + 1, stride)[:max_windows]
    # One buffer for all windows: logits of 1,024 tokens over a vocabulary of 49,152 take 201 MB.
    buffer = np.empty((1, window, decoder.manifest.vocab_size), np.float32)
    sums, counts = [], []
    for index, start in enumerate(starts):
        part = tokens[start : start + window]
        logits, _ = decoder.forward(part[None], out=buffer)
        # An overlapping window scores what the one before it did not: its last `stride` tokens.
        first = 1 if index == 0 or stride == window else window - stride
        losses = token_nll(logits[0, first - 1 : -1], part[first:])
        if not np.isfinite(losses).all():
            raise EdgepruneError(f"window {index} has logits that are not finite; validate the bundle")
        sums.append(float(losses.sum()))
        counts.append(len(losses))
        if progress:
            progress(index + 1, len(starts))
    nll = math.fsum(sums) / sum(counts)
    return Perplexity(
        perplexity=math.exp(min(nll, 700.0)),  # e**700 is near the largest float: a broken model must not overflow
        nll=nll,
        scored_tokens=sum(counts),
        windows=len(starts),
        window_tokens=window,
        stride_tokens=stride,
        window_nll=tuple(total / count for total, count in zip(sums, counts, strict=True)),
        text_hash=text_hash,
        joining=joining,
    )


def report_perplexity(result: Perplexity, *, bundle: str, variant: str, source: str) -> Report:
    """A perplexity as a report, with all that names it."""
    rows: tuple[tuple[Cell, ...], ...] = (
        ("variant", variant),
        ("perplexity", result.perplexity),
        ("nll_nats_per_token", result.nll),
        ("scored_tokens", result.scored_tokens),
        ("windows", result.windows),
        ("window_tokens", result.window_tokens),
        ("stride_tokens", result.stride_tokens),
        ("text", source),
        ("joining", result.joining),
        ("text_sha256", result.text_hash),
    )
    data = {"eval": {**asdict(result), "bundle": bundle, "variant": variant, "text": source}}
    return Report("edgeprune eval", this_machine(), (Table(bundle, ("figure", "value"), rows),), (), data)


def token_nll(logits: Logits, targets: Ids) -> npt.NDArray[np.float64]:
    """Negative log-likelihood (P,) float64 of targets (P,) under logits (P, V), by pieces that bound the memory."""
    losses = np.empty(len(targets), np.float64)
    for start in range(0, len(targets), _CHUNK_POSITIONS):
        piece = slice(start, start + _CHUNK_POSITIONS)
        values = logits[piece].astype(np.float64)
        wanted = values[np.arange(len(values)), targets[piece]]
        top = values.max(axis=1)
        np.exp(values - top[:, None], out=values)
        losses[piece] = top + np.log(values.sum(axis=1)) - wanted
    return losses
