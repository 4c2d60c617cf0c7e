"""What the calibration tokens say about every block: moments of inputs, loss gradients, and the units' scores.

The model is walked block by block, so that a step needs the weights and gradients of one block only:

    forward    x_0 = embedding;  x_{l+1} = block_l(x_l)      moments of the inputs of o_proj and down_proj on the way
    tail       loss = cross entropy(head(norm(x_L)));  g_L = dloss/dx_L
    backward   for l = L-1 .. 0: recompute block_l(x_l), backpropagate g_{l+1} -> dloss/dW or dloss/dh of block_l, g_l
               the gradients become scores at once and are dropped

with h the inputs of o_proj and down_proj; only those gradients are computed that the method reads. They equal those of
one backward pass through the whole model. In memory at one time are one block, its Gram matrices or gradients, and the
activations of one step; x_l and g_l are rows of the journal, and so are the moments of the blocks that are done. Every
block of every pass is a step that the journal remembers:

    moments-MODULE   Gram matrices and mean of the inputs of one Linear
    statistics-L     scores and influence of block L; after it come the rows hidden-{L+1}, kept until L+2 is done
    loss             the loss; and the rows gradient-{number of blocks}
    gradients-L      scores of block L; and the rows gradient-L

With several ranks each walks its own sequences, and sums over tokens become sums over all ranks at the end of a block.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from edgeprune import plugins
from edgeprune.distributed import Ranks
from edgeprune.groups import Group, Slot
from edgeprune.importance import Evidence, SlotEvidence
from edgeprune.journal import Entry, Journal, Rows
from edgeprune.shrink import Linear, LinearShape, linear_of, oriented
from edgeprune.streaming import Decoder, Pass
from edgeprune_runtime.errors import EdgepruneError

Progress = Callable[[str, int, int], None]
"""Called with (what happens, steps done, steps in all)."""

Watcher = Callable[[torch.Tensor], None]
"""Called with what a Linear reads or writes."""

BATCH_TOKENS = 4096
"""Tokens of one forward step: enough to keep the matrix units busy, few enough for one block's activations."""

HELD_OUT_EVERY = 8
"""One of so many calibration sequences is kept aside for the refit to judge itself."""

SAMPLES = 8
"""A method that looks at samples sees the sequences in so many parts at least: enough to estimate a variance."""

WEIGHT_NEEDS = frozenset({"gradient", "fisher"})
GRADED_NEEDS = WEIGHT_NEEDS | {"effect", "mask-fisher"}
"""Evidence that takes the gradients of weights, and all that takes a backward pass."""

GRAM_STRIP = 256
"""Rows of a Gram matrix that are computed together, from the diagonal on."""

ROUNDING = 1e-6
"""Of a float32 sum, a part that is smaller than this share of it cannot be told from none."""


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs X `(tokens, K)` of one Linear, float32.

    Attributes:
        gram: `(K, K)`, X^T X / tokens of all tokens.
        mean: `(K,)`, mean input of all tokens.
        held_out_gram: `(K, K)`, the same of the tokens kept aside, on which a refit judges itself; None without any.
        held_out_share: share of all tokens that is kept aside.
        held_out_mean: `(K,)`, mean input of the tokens kept aside; None without any.
    """

    gram: torch.Tensor
    mean: torch.Tensor
    held_out_gram: torch.Tensor | None = None
    held_out_share: float = 0.0
    held_out_mean: torch.Tensor | None = None

    def fitting(self) -> "Moments":
        """Moments of the tokens that are not kept aside.

        Of an input that is 0 on all of them the difference leaves rounding errors, which are no moments.
        """
        if self.held_out_gram is None or self.held_out_mean is None:
            return self
        share = self.held_out_share
        gram = (self.gram - share * self.held_out_gram) / (1 - share)
        mean = (self.mean - share * self.held_out_mean) / (1 - share)
        is_dead = gram.diagonal() <= ROUNDING * self.gram.diagonal()
        gram[is_dead] = gram[:, is_dead] = mean[is_dead] = 0.0
        return Moments(gram, mean)

    def packed(self) -> Entry:
        """The same as an entry of the journal; two symmetric matrices share one square, one in each triangle."""
        if self.held_out_gram is None or self.held_out_mean is None:
            return Entry({"grams": self.gram, "mean": self.mean})
        grams = self.gram.triu() + self.held_out_gram.tril(-1)
        diagonal = self.held_out_gram.diagonal().clone()
        return Entry(
            {"grams": grams, "mean": self.mean, "held_out_diagonal": diagonal, "held_out_mean": self.held_out_mean},
            {"held_out_share": self.held_out_share},
        )

    @classmethod
    def unpacked(cls, entry: Entry) -> Self:
        """Moments from an entry of the journal."""
        tensors = entry.tensors
        if "held_out_diagonal" not in tensors:
            return cls(tensors["grams"], tensors["mean"])
        held_out_gram = _mirrored(tensors["grams"].T.triu(1))
        held_out_gram.diagonal().copy_(tensors["held_out_diagonal"])
        return cls(
            gram=_mirrored(tensors["grams"].triu()),
            mean=tensors["mean"],
            held_out_gram=held_out_gram,
            held_out_share=entry.facts["held_out_share"],
            held_out_mean=tensors["held_out_mean"],
        )


class JournalMoments(Mapping[str, Moments]):
    """Moments by module name, read back from the journal each time they are asked for: they are large."""

    def __init__(self, journal: Journal, modules: Iterable[str]) -> None:
        self._journal = journal
        self._modules = dict.fromkeys(modules)

    def __getitem__(self, module: str) -> Moments:
        if module not in self._modules:
            raise KeyError(module)
        return Moments.unpacked(self._journal.entry(moments_entry(module)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def moments_entry(module: str) -> str:
    """Name of the journal's entry with the moments of a Linear's inputs."""
    return f"moments-{module}"


@dataclass(frozen=True)
class Stats:
    """What one pass over the calibration tokens found.

    Attributes:
        moments: module name of each Linear that reads units (o_proj, down_proj) -> moments of its inputs; empty where
            nobody asked for them.
        scores: group name -> float32 `(units,)`, higher = keep.
        loss: mean cross entropy in nats over the tokens the gradients saw; None if the method reads no gradients.
        influence: of each block, 1 - mean cosine of its input and output (ShortGPT, arXiv 2403.03853): how much it
            turns the hidden state.
    """

    moments: Mapping[str, Moments]
    scores: Mapping[str, torch.Tensor]
    loss: float | None
    influence: Sequence[float] = ()


@dataclass(frozen=True)
class Method:
    """An importance method as the user named it: `name` or `name:argument`."""

    name: str
    argument: str | None
    module: ModuleType

    @classmethod
    def parse(cls, spec: str) -> "Method":
        """Find the method's file.

        Raises:
            EdgepruneError: if there is no such method (the message names the nearest), or it takes no argument.
        """
        name, _, argument = spec.partition(":")
        module = plugins.find("importance", name, "importance method")
        if argument and not getattr(module, "ARGUMENT", None):
            raise EdgepruneError(
                f"importance method {name!r} takes no argument; expected --method {name}, got {spec!r}"
            )
        if hasattr(module, "check"):
            module.check(argument or None)
        return cls(name, argument or None, module)

    @property
    def needs(self) -> frozenset[str]:
        """Evidence the method reads."""
        needs: frozenset[str] = self.module.NEEDS
        return needs

    @property
    def reads_gradients(self) -> bool:
        """Whether the method needs the backward pass."""
        return bool(self.needs & GRADED_NEEDS)

    def graded(self, gradient_sequences: int, sequences: int) -> int:
        """How many of the calibration sequences the loss gradients see, where so many are wished for."""
        return min(gradient_sequences, sequences) if self.reads_gradients else 0

    @property
    def sampled(self) -> tuple[str, ...]:
        """Methods whose scores of single samples this method reads."""
        names: tuple[str, ...] = self.module.sampled(self.argument) if hasattr(self.module, "sampled") else ()
        return names

    def scores(self, group: Group, evidence: Evidence) -> torch.Tensor:
        """Scores of one group: float32 `(units,)`."""
        scores: torch.Tensor = self.module.scores(group, evidence, self.argument)
        return scores


def gather(
    model: PreTrainedModel | Decoder,
    groups: Sequence[Group],
    ids: torch.Tensor,
    method: Method,
    *,
    with_moments: bool = True,
    dtype: torch.dtype = torch.float32,
    gradient_sequences: int | None = None,
    step_tokens: int = BATCH_TOKENS,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Stats:
    """Moments and scores of every group, from calibration tokens `ids` `(N, T)` int64.

    Args:
        model: the dense model.
        groups: its groups.
        ids: calibration tokens.
        method: the importance method.
        with_moments: keep the moments of all blocks (the refit reads them).
        dtype: of the matrix products (float32 or bfloat16); sums are float32 in both.
        gradient_sequences: how many of the sequences the gradients see; all by default. Every block's input is held
            for these.
        step_tokens: tokens that go through a block at once.
        journal: remembers every finished block; in memory by default.
        ranks: the processes that share the sequences; this one alone by default.
        progress: told of every block.

    Raises:
        EdgepruneError: if the statistics are not finite (the model or the text is broken).
    """
    graded = method.graded(gradient_sequences or len(ids), len(ids))
    walk = BlockWalk(
        Decoder.of(model),
        groups,
        ids,
        method,
        graded=graded,
        with_moments=with_moments,
        dtype=dtype,
        step_tokens=step_tokens,
        journal=Journal() if journal is None else journal,
        ranks=Ranks() if ranks is None else ranks,
    )
    for layer in range(walk.layers):
        progress("statistics", layer, walk.layers)
        walk.forward(layer)
    progress("statistics", walk.layers, walk.layers)
    if graded:
        walk.tail()
        for step, layer in enumerate(reversed(range(walk.layers))):
            progress("gradients", step, walk.layers)
            walk.backward(layer)
        progress("gradients", walk.layers, walk.layers)
    return walk.stats()


@dataclass(frozen=True)
class Piece:
    """Sequences that go through a block in one step.

    Attributes:
        first: number of the first one among all calibration sequences.
        rows: where they lie among the sequences of this rank.
        is_graded: the loss gradients see them.
        is_held_out: the refit is fitted without them, and judged on them.
    """

    first: int
    rows: slice
    is_graded: bool
    is_held_out: bool

    @property
    def count(self) -> int:
        """Number of sequences."""
        return int(self.rows.stop - self.rows.start)

    @property
    def numbers(self) -> slice:
        """Their numbers among all calibration sequences."""
        return slice(self.first, self.first + self.count)


def held_out(ids: torch.Tensor) -> torch.Tensor:
    """The calibration sequences `(N, T)` that are kept aside: the last ones."""
    return ids[len(ids) - len(ids) // HELD_OUT_EVERY :]


def share_out(sequences: int, graded: int, step: int, sample: int, ranks: Ranks) -> list[Piece]:
    """The pieces of this rank. What is graded, held out or one sample depends on the sequences' numbers alone.

    Args:
        sequences: number of calibration sequences of all ranks.
        graded: the first so many are graded.
        step: sequences of one step at most.
        sample: sequences of one sample; a graded piece is cut into samples without a rest where there are enough.
        ranks: who shares.
    """
    step = max(sample, min(step, -(-sequences // ranks.size)))
    aside = sequences - sequences // HELD_OUT_EVERY
    edges = sorted({0, graded, aside, sequences})
    ranges = []
    for begin, end in itertools.pairwise(edges):
        stride = step // sample * sample if begin < graded else step
        ranges += [(first, min(first + stride, end)) for first in range(begin, end, stride)]
    pieces, row = [], 0
    for first, end in ranges[ranks.rank :: ranks.size]:
        rows = slice(row, row + end - first)
        pieces.append(Piece(first, rows, is_graded=first < graded, is_held_out=first >= aside))
        row = rows.stop
    return pieces


class BlockWalk:
    """Walks a decoder block by block on fixed calibration tokens; every method is one step that the journal remembers.

    Two ranks are never further apart than one step, so that the rows of the step before last may go.
    """

    def __init__(
        self,
        decoder: Decoder,
        groups: Sequence[Group],
        ids: torch.Tensor,
        method: Method,
        *,
        graded: int,
        with_moments: bool,
        dtype: torch.dtype,
        step_tokens: int,
        journal: Journal,
        ranks: Ranks,
    ) -> None:
        self.decoder = decoder
        self.ids = ids
        self.method = method
        self.graded = graded
        self.dtype = dtype
        self.journal = journal
        self.ranks = ranks
        self.groups = {
            layer: list(members)
            for layer, members in itertools.groupby(sorted(groups, key=lambda group: group.layer), lambda g: g.layer)
        }
        self.layers = len(self.groups)
        self.keeps_moments = with_moments
        self.gathers_moments = with_moments or "inputs" in method.needs
        sequences, length_tokens = ids.shape
        step = max(1, step_tokens // length_tokens)
        self._sample: int | None = None  # sequences of one sample, where samples are wanted
        if "fisher" in method.needs:
            self._sample = 1  # F needs the gradient of every single sequence
        elif method.sampled:
            self._sample = min(step, max(1, graded // SAMPLES))
        self.pieces = share_out(sequences, graded, step, self._sample or 1, self.ranks)
        self._sequences = sum(piece.count for piece in self.pieces)
        self._graded_here = sum(piece.count for piece in self.pieces if piece.is_graded)
        self._pass = Pass(decoder, ids, dtype)

    def forward(self, layer: int) -> None:
        """Run a block: moments of the inputs of its Linears that read units, its influence, its scores."""
        if self._is_done(f"statistics-{layer}"):
            return
        hidden, output = self._hidden(layer), self._hidden(layer + 1)
        if layer == 0:
            with self.decoder.outside(torch.float32):
                for piece in self.pieces:
                    hidden[piece.rows] = self.decoder.embed(self.ids[piece.numbers])[0]
        modules = self._readers(layer) if self.gathers_moments else []
        cosines = torch.zeros(2, dtype=torch.float64)  # sum over the tokens, and their number
        with self.decoder.block(layer, self._pass.weights_dtype) as block:
            inputs = {name: LinearShape.of(self._linear(block, layer, name)).in_features for name in modules}
            sums = [{name: InputSums(count) for name, count in inputs.items()} for _ in "ab"]
            for piece in self.pieces:
                x = hidden[piece.rows]
                if piece.is_graded:
                    self._block_input(layer)[piece.rows] = x
                add = {(name, "in"): of_linear.add for name, of_linear in sums[piece.is_held_out].items()}
                with torch.no_grad(), self._shown(block, layer, add):
                    y = self._pass.run(layer, block, x)
                cosine = nn.functional.cosine_similarity(x, y, dim=-1)
                cosines += torch.tensor([cosine.double().sum(), cosine.numel()], dtype=torch.float64)
                output[piece.rows] = y
            self.ranks.sum([cosines, *(tensor for part in sums for found in part.values() for tensor in found.all())])
            moments = {name: moments_of(sums[0].pop(name), sums[1].pop(name)) for name in modules}
            if (self.keeps_moments and self.ranks.is_first) or (self.graded and "inputs" in self.method.needs):
                for name, found in moments.items():
                    self.journal.put(moments_entry(name), found.packed())
            tensors = {}
            if not self.graded:
                for group in self.groups[layer]:
                    tensors[scores_of(group)] = self.method.scores(
                        group, self._evidence(block, group, BlockFindings(moments))
                    )
        output.flush()
        if self.graded:
            self._block_input(layer).flush()
        influence = 1.0 - float(cosines[0] / cosines[1])
        self.journal.put(f"statistics-{layer}", Entry(tensors, {"influence": influence}))
        self.journal.forget(f"hidden-{layer - 1}")

    def tail(self) -> None:
        """Mean next-token cross entropy over all graded tokens, and its gradient for the last block's output."""
        if self._is_done("loss"):
            return
        hidden, gradient = self._hidden(self.layers), self._gradient(self.layers)
        length_tokens = self.ids.shape[1]
        chunk = self._pass.logit_tokens
        loss = torch.zeros(1, dtype=torch.float64)
        with self.decoder.outside(self._pass.weights_dtype, is_behind=True):
            for piece, offset in ((p, o) for p in self.pieces if p.is_graded for o in range(p.count)):
                row = slice(piece.rows.start + offset, piece.rows.start + offset + 1)
                ids, x = self.ids[piece.first + offset], hidden[row]
                of_row = torch.zeros_like(x)
                for begin in range(0, length_tokens - 1, chunk):
                    part, wanted = x[:, begin : begin + chunk].requires_grad_(), ids[begin + 1 : begin + chunk + 1]
                    logits = self._pass.logits(part)[0, : len(wanted)]
                    nats = nn.functional.cross_entropy(logits, wanted, reduction="sum") / self._targets
                    (of_row[:, begin : begin + chunk],) = torch.autograd.grad(nats, part)
                    loss += nats.item()
                gradient[row] = of_row
        self.ranks.sum([loss])
        gradient.flush()
        self.journal.put("loss", Entry(facts=loss.item()))

    def backward(self, layer: int) -> None:
        """Scores of a block's groups, and the loss gradient for its input, from that for its output."""
        if self._is_done(f"gradients-{layer}"):
            return
        groups = self.groups[layer]
        inputs, outgoing, incoming = self._block_input(layer), self._gradient(layer + 1), self._gradient(layer)
        wants_squares = "fisher" in self.method.needs
        slots = [slot for group in groups for slot in group.slots]
        graded_slots = slots if self.method.needs & WEIGHT_NEEDS else []
        shaped_slots = slots if "effect" in self.method.needs else []
        masked = groups if "mask-fisher" in self.method.needs else []
        masks = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in masked}
        readers = self._readers(layer) if masked else []
        samplers = [Method.parse(name) for name in self.method.sampled]
        read = self._readers(layer) if "inputs" in self.method.needs else []
        moments = {name: Moments.unpacked(self.journal.entry(moments_entry(name))) for name in read}
        samples: list[tuple[int, dict[tuple[str, str], torch.Tensor]]] = []
        with self.decoder.block(layer, torch.float32) as block:
            weights = {slot.module: self._linear(block, layer, slot.module).weight for slot in graded_slots}
            sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            squares = {name: torch.zeros_like(weight) for name, weight in weights.items()} if wants_squares else {}
            effects = {side: torch.zeros(self._lines(block, layer, *side)) for side in map(_side, shaped_slots)}
            with _gradients_for(block, weights.values()):
                for first, rows in self._graded_steps():
                    of_masks = {side: torch.zeros_like(effect) for side, effect in effects.items()}
                    with self._effects_summed(block, layer, of_masks):
                        incoming[rows], of_step, of_tokens = self._backpropagated(
                            layer, block, inputs[rows].float(), outgoing[rows], weights, readers
                        )
                    for group in masked:
                        masks[group.name] += self._mask_squares(group, of_tokens)
                    for side, effect in of_masks.items():
                        effects[side] += effect
                    for name, of_weight in of_step.items():
                        sums[name] += of_weight
                        if wants_squares:
                            # the loss is a mean over S samples; F wants the gradient of each sample's own mean loss
                            squares[name] += (of_weight * self.graded).square() / self.graded
                    scores = {
                        (group.name, sampler.name): sampler.scores(
                            group, self._evidence(block, group, BlockFindings(moments, of_step, effects=of_masks))
                        )
                        for group, sampler in itertools.product(groups, samplers)
                    }
                    samples.append((first, scores))
            self.ranks.sum([*sums.values(), *squares.values(), *effects.values(), *masks.values()])
            samples = sorted(itertools.chain(*self.ranks.gather(samples)), key=lambda sample: sample[0])
            tensors = {}
            for group in groups:
                of_samples = {m.name: torch.stack([s[group.name, m.name] for _, s in samples]) for m in samplers}
                found = BlockFindings(moments, sums, squares, effects, of_samples, masks)
                tensors[scores_of(group)] = self.method.scores(group, self._evidence(block, group, found))
        incoming.flush()
        self.journal.put(f"gradients-{layer}", Entry(tensors))
        self.journal.forget(f"gradient-{layer + 2}", f"inputs-{layer + 1}")

    def stats(self) -> Stats:
        """What all steps found.

        Raises:
            EdgepruneError: if a score is not finite.
        """
        self.ranks.all(True)  # nobody has a step to repeat any more
        self.journal.forget(f"hidden-{self.layers - 1}", f"hidden-{self.layers}", "inputs-0")
        self.journal.forget("gradient-0", "gradient-1")
        scores: dict[str, torch.Tensor] = {}
        influence = []
        for layer in range(self.layers):
            statistics = f"statistics-{layer}"
            influence.append(float(self.journal.facts(statistics)["influence"]))
            step = f"gradients-{layer}" if self.graded else statistics
            scores |= {g.name: self.journal.tensor(step, scores_of(g)) for g in self.groups[layer]}
        for name, values in scores.items():
            if not torch.isfinite(values).all():
                raise EdgepruneError(
                    f"the scores of {name} are not finite; expected finite activations and gradients: "
                    "check the model on this text, or calibrate in float32"
                )
        kept = [name for layer in range(self.layers) for name in self._readers(layer)] if self.keeps_moments else []
        loss = float(self.journal.facts("loss")) if self.graded else None
        return Stats(moments=JournalMoments(self.journal, kept), scores=scores, loss=loss, influence=influence)

    def _evidence(self, block: nn.Module, group: Group, found: "BlockFindings") -> Evidence:
        linear = partial(self._linear, block, group.layer)
        return evidence_of(group, self.groups[group.layer], linear, found)

    def _backpropagated(
        self,
        layer: int,
        block: nn.Module,
        x: torch.Tensor,
        outgoing: torch.Tensor,
        weights: Mapping[str, torch.Tensor],
        readers: Sequence[str],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradients of one step for the block's input and for the weights, and the effects of masks.

        Args:
            layer: number of the block.
            block: the block.
            x: `(B, T, D)` float32, its input.
            outgoing: `(B, T, D)` float32, the loss gradient for its output.
            weights: the weights whose gradients are wanted.
            readers: Linears of whose inputs h the effects `h * dloss/dh` `(B, T, K)` float32 are wanted.
        """
        x.requires_grad_()
        read: dict[str, torch.Tensor] = {}
        with self._shown(block, layer, {(name, "in"): partial(read.__setitem__, name) for name in readers}):
            y = self._pass.run(layer, block, x)
        of_x, *others = torch.autograd.grad(y, [x, *weights.values(), *read.values()], outgoing)
        of_weights, of_read = others[: len(weights)], others[len(weights) :]
        pairs = zip(read.items(), of_read, strict=True)
        effects = {name: h.detach().float() * gradient for (name, h), gradient in pairs}
        return of_x, dict(zip(weights, of_weights, strict=True)), effects

    @contextmanager
    def _effects_summed(self, block: nn.Module, layer: int, sums: Mapping["Side", torch.Tensor]) -> Iterator[None]:
        """While gradients are taken inside, the effects of masks on inputs or outputs of Linears are added to `sums`.

        The effect of a mask on a channel z is `sum over the tokens of z dloss/dz`, which is `sum_k w_k dloss/dw_k` of
        the channel's weights: no gradient of a weight is needed for it. A bias is no weight.
        """

        def watch(side: Side, z: torch.Tensor) -> None:
            name, which = side
            bias = self._linear(block, layer, name).bias if which == "out" else None
            value = z.detach() if bias is None else z.detach() - bias.detach()  # z itself would hold its own graph

            def add(gradient: torch.Tensor) -> None:
                sums[side].add_((value.float() * gradient.float()).flatten(0, -2).sum(0))

            z.register_hook(add)

        with self._shown(block, layer, {side: partial(watch, side) for side in sums}):
            yield

    def _lines(self, block: nn.Module, layer: int, name: str, side: str) -> int:
        """Inputs or outputs of a Linear."""
        shape = LinearShape.of(self._linear(block, layer, name))
        return shape.in_features if side == "in" else shape.out_features

    def _mask_squares(self, group: Group, effects: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a step adds to the mask Fisher information of each unit, from `_backpropagated`: float64 `(units,)`."""
        # KV heads have one mask for all their query heads
        reader = next(iter(dependants_of(group, self.groups[group.layer])), group)
        slot = reader.inner
        channels = effects[slot.module][..., slot.all_lines(reader.units)]
        # the loss is a mean over all targets; the information is of the nats themselves, and the mean of their squares
        of_units = channels.reshape(-1, group.units, channels.shape[-1] // group.units).sum(-1) * self._targets
        return of_units.square().sum(0, dtype=torch.float64) / self._targets

    def _is_done(self, step: str) -> bool:
        return self.ranks.all(step in self.journal)

    def _readers(self, layer: int) -> list[str]:
        """Names of a block's Linears that read units."""
        return readers_of(self.groups[layer])

    def _linear(self, block: nn.Module, layer: int, name: str) -> Linear:
        return linear_in(self.decoder, block, layer, name)

    def _graded_steps(self) -> Iterator[tuple[int, slice]]:
        """(number of the first sequence, rows) of each backward step: a sample where samples are wanted."""
        for piece in filter(lambda piece: piece.is_graded, self.pieces):
            step = self._sample or piece.count
            for offset in range(0, piece.count, step):
                row = piece.rows.start + offset
                yield piece.first + offset, slice(row, min(row + step, piece.rows.stop))

    @property
    def _targets(self) -> int:
        """Graded tokens that are predicted, on all ranks: all but the first of each sequence."""
        return self.graded * (self.ids.shape[1] - 1)

    def _hidden(self, layer: int) -> Rows:
        shape = (self._sequences, self.ids.shape[1], self.decoder.config.hidden_size)
        return self.journal.rows(f"hidden-{layer}", shape, torch.float32)

    def _block_input(self, layer: int) -> Rows:
        shape = (self._graded_here, self.ids.shape[1], self.decoder.config.hidden_size)
        return self.journal.rows(f"inputs-{layer}", shape, self.dtype)

    def _gradient(self, layer: int) -> Rows:
        shape = (self._graded_here, self.ids.shape[1], self.decoder.config.hidden_size)
        return self.journal.rows(f"gradient-{layer}", shape, torch.float32)

    def _shown(self, block: nn.Module, layer: int, watchers: Mapping["Side", Watcher]) -> AbstractContextManager[None]:
        """Inside, each watcher is called with what its Linear reads or writes."""
        return shown((self._linear(block, layer, name), which, watcher) for (name, which), watcher in watchers.items())


Side = tuple[str, str]
"""A Linear's name, and "in" or "out"."""


@dataclass(frozen=True)
class BlockFindings:
    """What a walk has found of a block, by Linear (effects also by side) or by group; see `importance.Evidence`."""

    moments: Mapping[str, Moments]
    gradients: Mapping[str, torch.Tensor] = field(default_factory=dict)
    squares: Mapping[str, torch.Tensor] = field(default_factory=dict)
    effects: Mapping[Side, torch.Tensor] = field(default_factory=dict)
    samples: Mapping[str, torch.Tensor] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)


def evidence_of(
    group: Group, siblings: Sequence[Group], linear: Callable[[str], Linear], found: BlockFindings
) -> Evidence:
    """Evidence of one group, oriented so that dimension 0 is the channel.

    Args:
        group: the group.
        siblings: all groups of its block.
        linear: finds a Linear of the block by its name.
        found: what is known.
    """

    def of_slot(slot: Slot, units: int) -> SlotEvidence:
        rows = slot.all_lines(units)
        module = linear(slot.module)
        inputs = found.moments.get(slot.module) if slot.side == "in" else None

        def channels(matrix: torch.Tensor) -> torch.Tensor:
            matrix = oriented(module, matrix)
            return (matrix if slot.side == "out" else matrix.T)[rows].float()

        return SlotEvidence(
            slot=slot,
            weight=channels(module.weight.detach()),
            gradient=channels(found.gradients[slot.module]) if found.gradients else None,
            fisher=channels(found.squares[slot.module]) if found.squares else None,
            effect=found.effects[_side(slot)][rows] if found.effects else None,
            input_sq_mean=inputs.gram.diagonal()[rows] if inputs else None,
            input_mean=inputs.mean[rows] if inputs else None,
            gram=inputs.gram[rows, rows] if inputs else None,
        )

    readers = dependants_of(group, siblings)
    return Evidence(
        slots=tuple(of_slot(slot, group.units) for slot in group.slots),
        samples=found.samples,
        dependants=tuple(of_slot(slot, reader.units) for reader in readers for slot in reader.slots),
        mask_fisher=found.masks.get(group.name),
        dependants_mask_fisher=next((found.masks.get(reader.name) for reader in readers), None),
    )


def dependants_of(group: Group, siblings: Sequence[Group]) -> list[Group]:
    """The groups of the block whose units go with a unit of this one."""
    return [other for other in siblings if other.parent == group.name]


def readers_of(groups: Sequence[Group]) -> list[str]:
    """Names of the Linears that read the units of groups."""
    return [slot.module for group in groups for slot in group.slots if slot.side == "in"]


def linear_in(decoder: Decoder, block: nn.Module, layer: int, name: str) -> Linear:
    """A Linear of a block by its name in the model; the block may be a copy of the model's own."""
    return linear_of(block, name.removeprefix(decoder.prefix(layer)))


def moment_scores(
    decoder: Decoder, groups: Sequence[Group], method: Method, moments: Mapping[str, Moments]
) -> dict[str, torch.Tensor]:
    """Scores `(units,)` float32 of the groups of one block, by a method that reads weights and moments alone."""
    layer = groups[0].layer
    read = readers_of(groups) if "inputs" in method.needs else []
    found = BlockFindings({name: moments[name] for name in read})
    with decoder.block(layer) as block:
        linear = partial(linear_in, decoder, block, layer)
        return {group.name: method.scores(group, evidence_of(group, groups, linear, found)) for group in groups}


@contextmanager
def shown(watchers: Iterable[tuple[Linear, str, Watcher]]) -> Iterator[None]:
    """Inside, each watcher is called with what its Linear reads ("in") or writes ("out")."""
    hooks = []
    for linear, which, watcher in watchers:
        if which == "in":
            hooks.append(linear.register_forward_pre_hook(partial(_show_input, watcher)))
        else:
            hooks.append(linear.register_forward_hook(partial(_show_output, watcher)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _show_input(watcher: Watcher, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    watcher(inputs[0])


def _show_output(watcher: Watcher, _: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    watcher(output)


def _side(slot: Slot) -> Side:
    return slot.module, slot.side


def scores_of(group: Group) -> str:
    """Key of a group's scores in the entry of its block."""
    return f"scores.{group.name}"


class InputSums:
    """Sums over the tokens that a Linear has read: X^T X `(K, K)`, the sum of inputs `(K,)`, and their number.

    Of X^T X, which is symmetric, only the diagonal and what lies above it count.
    """

    def __init__(self, inputs: int) -> None:
        self.gram = torch.zeros(inputs, inputs)
        self.total = torch.zeros(inputs)
        self.tokens = torch.zeros((), dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """Add inputs `(..., K)` of any precision."""
        x = x.reshape(-1, x.shape[-1]).float()
        for begin in range(0, len(self.gram), GRAM_STRIP):
            strip = slice(begin, begin + GRAM_STRIP)
            self.gram[strip, begin:].addmm_(x[:, strip].T, x[:, begin:])
        self.total += x.sum(0)
        self.tokens += len(x)

    def all(self) -> list[torch.Tensor]:
        """The tensors that are summed over all ranks."""
        return [self.gram, self.total, self.tokens]


def moments_of(fitting: InputSums, held_out: InputSums) -> Moments:
    """Moments of both parts of the tokens; the sums are used up."""
    tokens, aside = float(fitting.tokens + held_out.tokens), float(held_out.tokens)
    if not aside:
        return Moments(_mirrored(fitting.gram.triu_()) / tokens, fitting.total / tokens)
    return Moments(
        gram=_mirrored((fitting.gram.add_(held_out.gram)).triu_()).div_(tokens),
        mean=(fitting.total + held_out.total) / tokens,
        held_out_gram=_mirrored(held_out.gram.triu_()).div_(aside),
        held_out_share=aside / tokens,
        held_out_mean=held_out.total / aside,
    )


def _mirrored(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of an upper triangle."""
    return upper + upper.triu(1).T


@contextmanager
def _gradients_for(block: nn.Module, weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """Only these weights ask for gradients inside."""
    before = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    try:
        block.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
