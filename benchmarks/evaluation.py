"""How good a torch model is on real text: WikiText-2 perplexity, and LAMBADA accuracy."""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeprune.sources import count_parameters
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.text import read_text

LAMBADA_BATCH = 8  # logits of 8 x 128 tokens over a vocabulary of 49,152 take 200 MB


@dataclass(frozen=True)
class Outcome:
    """One model on the evaluation texts: its size, the mean loss of each window in nats, and LAMBADA's accuracy."""

    parameters: int
    block_parameters: int
    window_nll: tuple[float, ...]
    lambada: float | None

    @property
    def perplexity(self) -> float:
        """Perplexity over all windows, which have the same number of tokens."""
        return math.exp(statistics.fmean(self.window_nll))


@dataclass(frozen=True)
class Evaluation:
    """The texts that every model is measured on.

    Attributes:
        windows: (N, T) int64 of WikiText-2.
        passages: LAMBADA token ids and how many of them, at the end, are to be predicted; sorted by length.
    """

    windows: torch.Tensor
    passages: Sequence[tuple[list[int], int]]

    def measure(self, model: PreTrainedModel, advance: Callable[[int, int], None]) -> Outcome:
        """The outcome of a float32 model."""
        blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
        losses = []
        for done, ids in enumerate(self.windows):
            with torch.inference_mode():
                logits = model(ids[None], use_cache=False).logits[0, :-1]
                losses.append(cross_entropy(logits, ids[1:], reduction="none").double().mean().item())
            advance(done + 1, len(self.windows))
        right = sum(map(int, self._predicted(model)))
        accuracy = right / len(self.passages) if self.passages else None
        return Outcome(count_parameters(model), blocks, tuple(losses), accuracy)

    def _predicted(self, model: PreTrainedModel) -> Iterator[bool]:
        """For each passage, whether every token of its last word is the most likely one."""
        for start in range(0, len(self.passages), LAMBADA_BATCH):
            batch = self.passages[start : start + LAMBADA_BATCH]
            # Padding behind a row is unseen by what stands before it, so no mask is needed.
            rows = torch.zeros(len(batch), max(len(ids) for ids, _ in batch), dtype=torch.int64)
            for row, (ids, _) in zip(rows, batch, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            with torch.inference_mode():
                best = model(rows, use_cache=False).logits.argmax(-1)
            for row, (ids, count) in zip(best, batch, strict=True):
                yield row[len(ids) - count - 1 : len(ids) - 1].tolist() == ids[-count:]


def read_evaluation(
    tokenizer: PreTrainedTokenizerBase, wikitext2: Path, windows: int, window: int, lambada: Sequence[str] = ()
) -> Evaluation:
    """The first `windows` windows of a WikiText-2 file, and LAMBADA passages from lines of JSON.

    Raises:
        EdgepruneError: if the text is missing or too short.
    """
    ids = torch.tensor(tokenizer(read_text(wikitext2, rows_joined=True).text, verbose=False)["input_ids"])
    count = min(windows, len(ids) // window)
    if window < 2 or count < 1:
        raise EdgepruneError(
            f"{wikitext2} has {len(ids)} tokens; {windows} windows of {window} were asked for, "
            "at least 1 of 2 tokens that fits was expected"
        )
    passages = []
    for row in map(json.loads, lambada):
        context, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row["context"], f"{row['context']} {row['target']}")
        )
        passages.append((whole, len(whole) - len(context)))
    return Evaluation(ids[: count * window].view(count, window), sorted(passages, key=lambda passage: len(passage[0])))
