"""How good a torch model is on real text, on every scale the papers use: perplexity, LAMBADA, multiple choice.

Everything comes down to one question, "how likely are these tokens after those?", so there is one kernel, `score`, and
a task only says what it asks and how the answers are judged:

    context                        continuations
    first token of a window        the rest of the window                   perplexity
    a passage                      its last word                            LAMBADA: every token is the likeliest one
    question                       choice 1 | choice 2 | choice 3 ...       acc, acc_norm: the likeliest choice is right

The time goes into two places, and both are kept small. The vocabulary projection (a quarter of the arithmetic of a
model of 135 million parameters, and nearly all of its memory) sees only the positions that are judged. Choices share
the forward pass of their context: they stand behind it in one row, each at the positions right behind the context, and
the attention mask hides them from one another.

Tokens are those of lm-evaluation-harness: the context is tokenized, the continuation is what follows when context and
continuation are tokenized as one string.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeprune.precision import copy_in
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.text import jsonl_rows, read_text

BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding included: enough to keep the matrix units busy, little memory for activations."""
LOGIT_ROWS = 512
"""Positions whose logits exist at once: 512 over a vocabulary of 49,152 take 100 MB in float32."""

Advance = Callable[[int, int], None]
Result = dict[str, Any]
"""What one model did on one task, as plain values: losses and token counts, or which questions were answered right."""


# --- the kernel -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of what may follow it.

    Attributes:
        context: at least one token.
        continuations: at least one, none of them empty.
        characters: length of each continuation's text; multiple choice only, as the next.
        answer: which continuation is right.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    characters: Sequence[int] = ()
    answer: int = 0

    @property
    def row_tokens(self) -> int:
        """Tokens of its row in a batch."""
        return len(self.context) + sum(map(len, self.continuations))

    @property
    def span_tokens(self) -> int:
        """Positions that the model must know: the context and its longest continuation."""
        return len(self.context) + max(map(len, self.continuations))


@dataclass(frozen=True)
class Score:
    """A continuation: its negative log-likelihood in nats, and whether each of its tokens is the likeliest one.

    `is_greedy` is None where nobody asked.
    """

    nats: float
    is_greedy: bool | None


@torch.inference_mode()
def score(
    model: PreTrainedModel, questions: Sequence[Question], advance: Advance, *, greedy: bool = False
) -> list[list[Score]]:
    """The score of every continuation of every question, in their order. Losses are float32 whatever the model is.

    With `greedy` it is asked which token is the likeliest, and the vocabulary projection works in float32: rounded to
    bfloat16, the best two logits are often equal.

    Raises:
        EdgepruneError: if a question is longer than the model's context.
    """
    longest = max((question.span_tokens for question in questions), default=0)
    context_tokens = model.config.max_position_embeddings
    if longest > context_tokens:
        raise EdgepruneError(
            f"a passage of {longest} tokens was to be scored, the model's context holds {context_tokens}; "
            "lower --window, or leave out the task"
        )
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear), "a causal language model ends with a Linear"
    if greedy:
        head = copy.deepcopy(head).float()
    found: dict[int, list[Score]] = {}
    for batch in batches([question.row_tokens for question in questions]):
        asked = [questions[index] for index in batch]
        ids, mask, positions = _rows(asked, model.dtype)
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        rows, columns, targets = _predictions(asked)
        nats, likeliest = _losses(head, hidden[rows, columns], targets, greedy=greedy)
        counts = [len(tokens) for question in asked for tokens in question.continuations]
        scores = (
            Score(losses.double().sum().item(), bool(best.all()) if greedy else None)
            for losses, best in zip(nats.split(counts), likeliest.split(counts), strict=True)
        )
        for index, question in zip(batch, asked, strict=True):
            found[index] = list(itertools.islice(scores, len(question.continuations)))
        advance(len(found), len(questions))
    return [found[index] for index in range(len(questions))]


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of at most BATCH_TOKENS tokens (or one row), rows of like length together, longest first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _rows(
    questions: Sequence[Question], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Ids (B, T), additive attention mask (B, 1, T, T) and positions (B, T); no mask where plain causal order will do.

    Padding stands behind a row, where nothing that is judged can see it.
    """
    ids, positions, parts = (
        torch.zeros(len(questions), max(question.row_tokens for question in questions), dtype=torch.int64)
        for _ in range(3)
    )
    for row, question in enumerate(questions):
        start, end = 0, len(question.context)
        for part, tokens in enumerate((question.context, *question.continuations)):
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = torch.arange(len(tokens)) + (len(question.context) if part else 0)
            parts[row, start:end] = part
            start = end
        parts[row, end:] = len(question.continuations) + 1
    if all(len(question.continuations) == 1 for question in questions):
        return ids, None, None
    order = torch.arange(ids.shape[1])
    sees = (order[:, None] >= order) & ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None]))
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return ids, mask[:, None], positions


def _predictions(questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every judged token, in order: its row, the column that predicts it, and its id; each (N,) int64."""
    rows, columns, targets = [], [], []
    for row, question in enumerate(questions):
        start = len(question.context)
        for tokens in question.continuations:
            # The end of the context predicts the first token of every continuation.
            columns += [torch.tensor([len(question.context) - 1]), torch.arange(start, start + len(tokens) - 1)]
            rows.append(torch.full((len(tokens),), row))
            targets.append(torch.tensor(tokens))
            start += len(tokens)
    return torch.cat(rows), torch.cat(columns), torch.cat(targets)


def _losses(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, *, greedy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each target (N,) float32, and whether it is the likeliest token (N,) bool.

    Without `greedy` the second is false throughout: the search would take a tenth of the whole time.
    """
    nats, likeliest = [], []
    for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = head(rows.to(head.weight.dtype)).float()
        nats.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        likeliest.append(logits.argmax(-1) == wanted if greedy else torch.zeros(len(wanted), dtype=torch.bool))
    return torch.cat(nats), torch.cat(likeliest)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself if it has this dtype, else a copy whose parameters do."""
    return model if model.dtype == dtype else copy_in(model, dtype)


# --- tasks ------------------------------------------------------------------------------------------------------------


class Task(Protocol):
    """Questions, and how the answers are judged.

    `key` is everything that the result depends on besides the model: the text by its hash, and the settings. `greedy`
    tasks ask for the likeliest token.
    """

    @property
    def name(self) -> str: ...

    @property
    def greedy(self) -> bool: ...

    def key(self) -> dict[str, Any]: ...

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> list[Question]: ...

    def judge(self, questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> Result: ...


class _Perplexity:
    """How perplexity is judged, whatever the passages are."""

    name = "perplexity"
    greedy = False

    def judge(self, questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> Result:
        return {
            "nats": [of_question[0].nats for of_question in scores],
            "tokens": [len(question.continuations[0]) for question in questions],
        }


@dataclass(frozen=True)
class Windows(_Perplexity):
    """Perplexity of a text whose rows are joined by a blank line, in windows that do not overlap.

    As GPTQ, SparseGPT and Wanda do it: the first token of a window is not judged, an end shorter than a window is left
    out. `limit` is the number of windows, None for all.
    """

    path: Path
    window: int
    limit: int | None

    def key(self) -> dict[str, Any]:
        return {"task": "windows", "text": sha256(self.path), "window": self.window, "limit": self.limit}

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
        """One per window.

        Raises:
            EdgepruneError: if not one window fits.
        """
        ids = tokenizer(read_text(self.path, rows_joined=True).text, verbose=False)["input_ids"]
        count = len(ids) // self.window
        if count < 1:
            raise EdgepruneError(
                f"{self.path} has {len(ids)} tokens; at least one window of {self.window} was expected"
            )
        starts = range(0, count * self.window, self.window)
        return [Question([ids[at]], [ids[at + 1 : at + self.window]]) for at in itertools.islice(starts, self.limit)]


@dataclass(frozen=True)
class Documents(_Perplexity):
    """Perplexity of documents (`{"text"}` per line), each from the begin-of-text token and cut at `window` tokens.

    With `every_other` the second, fourth, ... document is judged: the others are there to calibrate on.
    """

    path: Path
    window: int
    limit: int | None
    every_other: bool

    def key(self) -> dict[str, Any]:
        settings = {"window": self.window, "limit": self.limit, "every_other": self.every_other}
        return {"task": "documents", "text": sha256(self.path), **settings}

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
        """One per document.

        Raises:
            EdgepruneError: if the tokenizer has no token that begins a text.
        """
        begin = tokenizer.bos_token_id
        if not isinstance(begin, int):
            raise EdgepruneError("the tokenizer has no begin-of-text token; --documents needs one")
        texts = documents(self.path)[1 if self.every_other else 0 :: 2 if self.every_other else 1]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        found = (Question([begin], [ids[: self.window - 1]]) for ids in encoded if ids)
        return list(itertools.islice(found, self.limit))


@dataclass(frozen=True)
class Lambada:
    """LAMBADA: whether greedy decoding of the passage gives its last word."""

    path: Path
    limit: int | None
    name = "lambada"
    greedy = True

    def key(self) -> dict[str, Any]:
        return {"task": self.name, "text": sha256(self.path), "limit": self.limit}

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
        """One per passage, with one continuation."""
        return [question(tokenizer, row["context"], [row["target"]]) for row in _rows_of(self.path, self.limit)]

    def judge(self, questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> Result:
        return {"acc": _flags(bool(of_question[0].is_greedy) for of_question in scores)}


@dataclass(frozen=True)
class Choices:
    """Multiple choice: `acc` compares log-likelihoods of whole choices, `acc_norm` divides them by their characters."""

    name: str
    path: Path
    limit: int | None
    greedy = False

    def key(self) -> dict[str, Any]:
        return {"task": "choices", "text": sha256(self.path), "limit": self.limit}

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
        """One per item, with its choices as continuations."""
        rows = _rows_of(self.path, self.limit)
        return [question(tokenizer, row["context"], row["choices"], row["answer"]) for row in rows]

    def judge(self, questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> Result:
        # min takes the first of equals, as numpy's argmax does in lm-evaluation-harness.
        sums = [[of_choice.nats for of_choice in of_question] for of_question in scores]
        norms = [
            [nats / length for nats, length in zip(nats_of, question.characters, strict=True)]
            for question, nats_of in zip(questions, sums, strict=True)
        ]
        return {
            name: _flags(
                nats_of.index(min(nats_of)) == question.answer
                for question, nats_of in zip(questions, nats, strict=True)
            )
            for name, nats in (("acc", sums), ("acc_norm", norms))
        }


def question(tokenizer: PreTrainedTokenizerBase, context: str, choices: Sequence[str], answer: int = 0) -> Question:
    """A context and what may follow it after a space, as lm-evaluation-harness tokenizes them.

    Raises:
        EdgepruneError: if a continuation is no token of its own.
    """
    # Spaces at the end of a context belong to the word behind them.
    bare = context.rstrip()
    start = tokenizer(bare, verbose=False)["input_ids"]
    wholes = [tokenizer(f"{context} {choice}", verbose=False)["input_ids"] for choice in choices]
    continuations = [whole[len(start) :] for whole in wholes]
    if not start or not all(continuations) or not all(choices):
        raise EdgepruneError(f"a context and a choice have no token of their own: {context!r}, {list(choices)!r}")
    return Question(start, continuations, [len(choice) for choice in choices], answer)


def perplexity(result: Result) -> float:
    """Perplexity over all judged tokens."""
    return math.exp(sum(result["nats"]) / sum(result["tokens"]))


def accuracy(flags: str) -> float:
    """Share of the questions that were answered right."""
    return flags.count("1") / len(flags)


def documents(path: Path) -> list[str]:
    """The texts of a file of `{"text"}` lines.

    Raises:
        EdgepruneError: if it has none.
    """
    read_text(path)
    return list(jsonl_rows(path.read_text("utf-8"), path))


@functools.cache
def sha256(path: Path) -> str:
    """Hash of a file, 16 digits of it: enough to tell files apart, and short enough to read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _rows_of(path: Path, limit: int | None) -> list[dict[str, Any]]:
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    lines = filter(None, path.read_text("utf-8").split("\n"))
    return [json.loads(line) for line in itertools.islice(lines, limit)]


def _flags(values: Iterator[bool]) -> str:
    """One digit per question, so that two models can be compared question by question in little space."""
    return "".join("01"[value] for value in values)
