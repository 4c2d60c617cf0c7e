"""Whole candidates: a model cut this way or that, judged by what it makes of calibration text.

Losses of single layers do not add up over a model: layers that could each go alone make up for each other. So scores,
rules and a search for widths are judged by whole candidates, each a keep list. Two things may be asked of one:

    divergence(keep)         KL(dense || candidate) of the next token, mean over the tokens, in nats: a forward pass,
                             for which one block is in memory
    effects(keep, options)   for every option of every layer, what that one step would change the divergence by:
                             a forward and a backward pass, and the changed block once for every option; for this the
                             whole candidate is in memory

and beside them the scores of another importance method, if the moments tell them.

An effect is the Taylor series of the divergence around the candidate, up to its second term. At token t, let d_t be
what the option changes in the block's output (on the candidate's own inputs), g_t the gradient of the divergence for
that output, and s_t the gradient of the loss of tokens drawn from the candidate's own predictions, whose mean square is
the Fisher information, which stands for the Hessian:

    effect = mean_t <g_t, d_t> + 1/2 mean_t <s_t, d_t>^2

If the cut will be refitted, so is every width before it is judged: by least squares at one ridge, on the calibration
tokens that do not judge. What was fitted for the candidate whose effects were asked for, and for its options, stays in
memory until the next such question.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.functional import log_softmax

from edgeprune.aims import divergence_of
from edgeprune.budget import Effect
from edgeprune.groups import Group, Keep, kept
from edgeprune.journal import Entry, Journal
from edgeprune.reconstruct import JUDGED_TOKENS
from edgeprune.refit import refit_unjudged
from edgeprune.shrink import linear_of, shrink_blocks, weight_of
from edgeprune.statistics import Method, Moments, Progress, moment_scores
from edgeprune.streaming import Decoder, Pass

Effects = Mapping[int, Sequence[Effect]]
"""Layer -> the effect of each of its options."""

STEP = "search"
"""In the journal: search-1, search-2 and so on are the answers to the questions of one allocation; search-2-17 is what
left block 17 when question 2 was interrupted, and search-dense-0-29 what leaves the last dense block."""


def judging_sequences(held_out: int, length_tokens: int) -> int:
    """How many of the sequences kept aside judge: as many as hold `JUDGED_TOKENS`, but two if there are two."""
    return min(held_out, max(2, JUDGED_TOKENS // length_tokens))


class Candidates:
    """Judges cuts of one model on the same tokens. What it has found stays in the journal, question by question.

    Attributes:
        proposing: the half of the sequences to ask for effects on.
        accepting: the half on which candidates are compared.
        stage: what the next question is for, in words, to whoever watches the progress.
    """

    def __init__(
        self,
        decoder: Decoder,
        moments: Mapping[str, Moments],
        ids: torch.Tensor,
        *,
        is_refitted: bool = True,
        dtype: torch.dtype = torch.float32,
        step_tokens: int,
        journal: Journal,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        """Prepare to judge; nothing is computed yet.

        Args:
            decoder: the dense model.
            moments: moments of the inputs of the Linears that read units.
            ids: tokens kept aside, `(N, T)` int64, of which `judging_sequences` judge; effects are asked for on one
                half of these, candidates compared on the other.
            is_refitted: whether the final cut will be refitted.
            dtype: of the matrix products.
            step_tokens: tokens that go through a block at once.
            journal: remembers every answer.
            progress: told of every block that has run, of as many as the question takes.
        """
        assert len(ids), "candidates are judged on calibration sequences"
        self._decoder = decoder
        self._moments = moments
        self._is_refitted = is_refitted
        self._rows = max(1, step_tokens // ids.shape[1])
        self._ids = ids = ids[: judging_sequences(*ids.shape)]
        self.proposing = slice(0, len(ids) // 2)
        self.accepting = slice(len(ids) // 2, len(ids))
        self._journal = journal
        self.stage = ""
        self._progress = progress
        self._questions = 0
        self._blocks_run, self._blocks_to_run = 0, 0
        self._pass = Pass(decoder, ids, dtype)
        self._fitted: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._dense: dict[tuple[int, int], torch.Tensor] = {}
        self._groups = [
            list(members) for _, members in itertools.groupby(decoder.groups, key=lambda group: group.layer)
        ]

    def scores(self, method: str) -> dict[str, torch.Tensor]:
        """Scores of all units, by group, of an importance method that reads weights and moments of inputs alone."""
        asked, found = Method.parse(method), dict[str, torch.Tensor]()

        def score(groups: Sequence[Group]) -> Entry:
            return Entry(moment_scores(self._decoder, groups, asked, self._moments))

        for layer, groups in enumerate(self._groups):
            self._progress(f"scores of {method}", layer, self._decoder.layers)
            found |= self._journal.remember(f"scores-{method}-{layer}", partial(score, groups)).tensors
        return found

    def divergence(self, keep: Keep, part: slice = slice(None)) -> float:
        """KL(dense || candidate), mean over the tokens of some of the sequences, nats."""

        def judge() -> Entry:
            pieces = list(self._pieces(part))
            self._see_dense(pieces)
            outputs = self._outputs(keep, pieces, self._question)
            total = sum(self._tail(rows, hidden)[0] for rows, hidden in zip(pieces, outputs, strict=True))
            return Entry(facts=total / self._ids[part].numel())

        return float(self._answer(judge, part, self._decoder.layers).facts)

    def effects(self, keep: Keep, options: Mapping[int, Sequence[Keep]], part: slice = slice(None)) -> Effects:
        """What each option of each layer would change the divergence by, on some of the sequences."""

        def judge() -> Entry:
            self._see_dense(list(self._pieces(part)))
            self._forget_fitted(keep, options)
            found = {layer: [[0.0, 0.0] for _ in of_layer] for layer, of_layer in options.items()}
            tokens = self._ids[part].numel()
            blocks = [self._block(layer, keep) for layer in range(self._decoder.layers)]
            for rows in self._pieces(part):
                with torch.no_grad():
                    inputs = self._forward(rows, blocks)
                _, divergence, drawn = self._tail(rows, inputs.pop(), with_gradients=True)
                for layer in reversed(range(len(blocks))):
                    x = inputs.pop().requires_grad_()
                    with torch.enable_grad():
                        y = self._run(layer, blocks[layer], x)
                    for terms, option in zip(found.get(layer, ()), options.get(layer, ()), strict=True):
                        with torch.no_grad():
                            change = self._run(layer, self._block(layer, option), x) - y
                        terms[0] += float((divergence * change).sum()) / tokens
                        terms[1] += float((drawn * change).sum(-1).square().sum()) / 2 / tokens
                    (before,) = torch.autograd.grad(y, x, divergence, retain_graph=True)
                    (drawn,) = torch.autograd.grad(y, x, drawn)
                    divergence = before
            return Entry(facts=[[layer, effects] for layer, effects in found.items()])

        runs = 2 * self._decoder.layers + sum(map(len, options.values()))
        answer = self._answer(judge, part, runs)
        return {int(layer): [Effect(*terms) for terms in effects] for layer, effects in answer.facts}

    def _answer(self, judge: Callable[[], Entry], part: slice, runs: int) -> Entry:
        """The answer to the next question; the same search asks the same questions in the same order.

        It runs so many blocks for each piece of the sequences, and the dense ones where that was not done before.
        """
        self._questions += 1
        pieces = list(self._pieces(part))
        unseen = sum((rows.start, rows.stop) not in self._dense for rows in pieces)
        self._blocks_run, self._blocks_to_run = 0, len(pieces) * runs + unseen * self._decoder.layers
        answer = self._journal.remember(self._question, judge)
        self._journal.forget(f"{self._question}-{self._decoder.layers - 1}")
        return answer

    @property
    def _question(self) -> str:
        return f"{STEP}-{self._questions}"

    def _pieces(self, part: slice) -> Iterator[slice]:
        first, last, _ = part.indices(len(self._ids))
        for begin in range(first, last, self._rows):
            yield slice(begin, min(begin + self._rows, last))

    def _forward(self, rows: slice, blocks: Sequence[nn.Module]) -> list[torch.Tensor]:
        """The input of each block, and the output of the last, each `(N, T, D)` float32."""
        states = [self._decoder.embed(self._ids[rows])[0]]
        for layer, block in enumerate(blocks):
            states.append(self._run(layer, block, states[-1]))
        return states

    def _see_dense(self, pieces: Sequence[slice]) -> None:
        """Keep what the dense model's last block puts out, as every question needs it."""
        if unseen := [rows for rows in pieces if (rows.start, rows.stop) not in self._dense]:
            name = f"{STEP}-dense-{unseen[0].start}-{unseen[-1].stop}"
            for rows, hidden in zip(unseen, self._outputs({}, unseen, name), strict=True):
                self._dense[rows.start, rows.stop] = hidden

    @torch.no_grad()
    def _outputs(self, keep: Keep, pieces: Sequence[slice], name: str) -> Sequence[torch.Tensor]:
        """What the last block of a candidate puts out, for each piece `(N, T, D)` float32; one block in memory.

        What leaves a block stays in the journal under this name until the next block has run.
        """
        layers, counts = range(self._decoder.layers), [rows.stop - rows.start for rows in pieces]
        first = next((layer + 1 for layer in reversed(layers) if f"{name}-{layer}" in self._journal), 0)
        if first:
            states = self._journal.tensor(f"{name}-{first - 1}", "hidden")
        else:
            states = torch.cat([self._decoder.embed(self._ids[rows])[0] for rows in pieces])
        self._blocks_run += first * len(pieces)
        fitted = self._fitted
        for layer in layers[first:]:
            self._fitted = dict(fitted)  # what is fitted for this candidate alone goes with its block
            block = self._block(layer, keep)
            output = torch.empty_like(states)
            for read, written in zip(states.split(counts), output.split(counts), strict=True):
                written.copy_(self._run(layer, block, read))
            states = output
            del block  # before the next one is made
            self._journal.put(f"{name}-{layer}", Entry({"hidden": states}))
            self._journal.forget(f"{name}-{layer - 1}")
        self._fitted = fitted
        outputs: Sequence[torch.Tensor] = states.split(counts)
        return outputs

    def _tail(
        self, rows: slice, hidden: torch.Tensor, *, with_gradients: bool = False
    ) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Sum of the divergences, its gradient for the last block's output, and that of the loss of drawn tokens."""
        dense = self._dense[rows.start, rows.stop]
        divergence, drawn = torch.zeros_like(hidden), torch.zeros_like(hidden)
        chunk = self._pass.logit_tokens
        generator = torch.Generator().manual_seed(rows.start)
        total = 0.0
        with self._decoder.outside(self._pass.weights_dtype, is_behind=True):
            for row, begin in itertools.product(range(len(hidden)), range(0, hidden.shape[1], chunk)):
                at = (slice(row, row + 1), slice(begin, begin + chunk))
                x = hidden[at].detach().requires_grad_(with_gradients)
                with torch.no_grad():
                    expected = log_softmax(self._pass.logits(dense[at])[0], -1)
                with torch.set_grad_enabled(with_gradients):
                    found = log_softmax(self._pass.logits(x)[0], -1)
                    nats = divergence_of(expected, found).sum()
                total += nats.item()
                if with_gradients:
                    token = torch.multinomial(found.detach().exp(), 1, generator=generator)
                    (divergence[at],) = torch.autograd.grad(nats, x, retain_graph=True)
                    (drawn[at],) = torch.autograd.grad(-found.gather(1, token).sum(), x)
        return total, divergence, drawn

    def _block(self, layer: int, keep: Keep) -> nn.Module:
        """A refitted and cut copy of one block."""
        groups = self._groups[layer]
        with self._decoder.block(layer) as dense:
            block = copy.deepcopy(dense)
        blocks = self._decoder.blocks
        original = blocks[layer]
        blocks[layer] = block
        try:
            for group in groups if self._is_refitted else ():
                if group.kind != "kv_heads" and len(kept(keep, group)) < group.units:
                    self._refit(group, tuple(kept(keep, group)))
            shrink_blocks(self._decoder.model, groups, keep)
        finally:
            blocks[layer] = original
        return block.requires_grad_(False).to(self._pass.dtype)

    @torch.no_grad()
    def _refit(self, group: Group, units: tuple[int, ...]) -> None:
        """Put the refitted columns into the Linear that reads a group; every choice of units is fitted once."""
        weight = weight_of(linear_of(self._decoder.model, group.inner.module))
        columns = torch.tensor(group.inner.lines(units))
        if (group.name, units) not in self._fitted:
            # the tokens that judge must not have been fitted on; and one ridge serves all, as choosing it for every
            # width would take longer than judging does
            moments = self._moments[group.inner.module].fitting()
            self._fitted[group.name, units] = refit_unjudged(weight, moments, columns).to(self._pass.dtype)
        weight[:, columns] = self._fitted[group.name, units].to(weight.dtype)

    def _forget_fitted(self, keep: Keep, options: Mapping[int, Sequence[Keep]]) -> None:
        """Drop what was fitted for other units than those of a candidate and of its options."""
        each = itertools.chain([keep], *options.values())
        read = {(name, tuple(units)) for of_each in each for name, units in of_each.items()}
        self._fitted = {choice: weight for choice, weight in self._fitted.items() if choice in read}

    def _run(self, layer: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        self._progress(f"widths, {self.stage}" if self.stage else "widths", self._blocks_run, self._blocks_to_run)
        self._blocks_run += 1
        return self._pass.run(layer, block, hidden)
