"""Block reconstruction: the MLP of a cut block is fitted until the block gives what the dense model's block gives.

After BRECQ (arXiv 2102.05426), which does so for quantised blocks. A closed-form refit can only mend the Linear that
reads the units, and only for the inputs that the dense model would give it. Here gate, up and down learn together, from
the inputs that the block has in the pruned model, so that each block also makes up for what the blocks before it lost:

    dense path    x_{l+1} = block_l(x_l)                           the block as it was
    pruned path   z_{l+1} = rest_l(z_l) + mlp_l(h_l)               the block as it is cut and refitted
    target        t_l     = x_{l+1} - rest_l(z_l)                  what the MLP would have to add
    fit           min over the MLP's weights of  mean_tokens ||mlp_l(h_l) - t_l||^2,   h_l read on the pruned path

by Adam on shuffled tokens, from where the closed-form refit has left the weights. No gradient passes from one block to
another and no more than one block is in memory, so this works for a model of any size. The sequences kept aside judge:
where they are not hit better than before, the block keeps its closed-form refit. Blocks behind the first cut that stay
whole are fitted like the others, since what is lost before them is theirs to mend as well. The last block is fitted to
what the dense model says in the end, not to what leaves its block (`edgeprune.aims`).

A calibration text names a part of the vocabulary, and what the other tokens need of the MLPs is lost unnoticed. The
dense model is a teacher whatever it reads, so in every other sequence some tokens are exchanged for any (`altered`).

Why not in closed form: with targets of the dense path, a least-squares fit of down_proj alone makes the whole model
worse than its own targets do. The MLP as a whole can follow them.

What flows between the blocks are rows of the journal (`dense-L`, `pruned-L`), as in `statistics`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig

from edgeprune.aims import Aim, Divergence, SquaredError
from edgeprune.configs import architecture
from edgeprune.groups import Group, blocks_name
from edgeprune.journal import Journal, Rows
from edgeprune.refit import PASSES, Outcome
from edgeprune.statistics import BATCH_TOKENS, held_out
from edgeprune.streaming import Decoder, Pass, return_freed_memory
from edgeprune_runtime.errors import EdgepruneError

STEP_TOKENS = 1024
"""Tokens of one step of Adam."""

SHUFFLED_TOKENS = 16384
"""Tokens of random sequences that are in memory at once with their targets, shuffled among each other (of the last
block, which reads one thing more, two thirds): steps of whole sequences are too much alike, and end at a worse fit."""

LEARNING_RATE = 0.005
"""Largest step of a weight, as a share of the root mean square of its matrix. Twice as much in two passes ended alike
on 128 sequences of C4 and, on 256, worse than this in four or five; a fit down to the least-squares optimum hits its
own text better, and other text worse."""

JUDGED_TOKENS = 8192
"""Of the sequences kept aside so many tokens judge a fit; the others are fitted as well, since every token helps."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; it falls to nothing along a cosine in the others."""

ALTERED_TOKENS = 0.15
"""Share of the tokens of an altered sequence that are exchanged for random ones, the share that BERT masks."""

LAST_PASSES = 1
"""Passes of the last block, each of which asks the head. With three in place of one, on 60 sequences of C4, the
divergence on others of C4 fell from 0.438 to 0.435 nats and the perplexity on WikiText-2 rose by 0.4 %."""

SEED = 0

BETAS = (0.9, 0.99)
"""Adam's memory: a few hundred steps are too few for its usual 0.999."""


class Paths:
    """The hidden states of the calibration sequences on both paths, block by block."""

    def __init__(
        self,
        decoder: Decoder,
        ids: torch.Tensor,
        dtype: torch.dtype,
        journal: Journal,
        *,
        passes: int = PASSES,
        step_tokens: int = BATCH_TOKENS,
        name: str = "",
        keeps_zeros: bool = False,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            decoder: the dense model, of which no block is cut yet (or those that the journal remembers).
            ids: calibration tokens `(N, T)` int64.
            dtype: of the matrix products.
            journal: keeps the hidden states.
            passes: how often a fit sees every token; that of the last block, `LAST_PASSES`.
            step_tokens: tokens that go through a block at once.
            name: sets its rows apart from those of others in the journal.
            keeps_zeros: weights that are zero stay zero in a fit.
        """
        self._decoder = decoder
        self._ids = ids
        self._journal = journal
        self._name = name
        self._passes = passes
        self._keeps_zeros = keeps_zeros
        self._fitting = fitted_sequences(ids)
        step = max(1, step_tokens // ids.shape[1])
        self._steps = [slice(first, min(first + step, len(ids))) for first in range(0, len(ids), step)]
        self._pass = Pass(decoder, ids, dtype)

    def embed(self) -> None:
        """What both paths begin with."""
        with self._decoder.outside(torch.float32):
            output = self._rows("dense", 0)
            for rows in self._steps:
                output[rows] = self._decoder.embed(self._ids[rows])[0]
            output.flush()

    def advance_dense(self, layer: int) -> None:
        """Run a dense block on the dense path; before the first one, embed the sequences."""
        if layer == 0:
            self.embed()
        with self._decoder.block(layer, self._pass.weights_dtype) as block:
            self._run(layer, block, self._rows("dense", layer), self._rows("dense", layer + 1))

    def dense(self, layer: int) -> Rows:
        """What enters a block on the dense path; of the number behind the last one, what leaves that."""
        return self._rows("dense", layer)

    def advance_pruned(self, layer: int, block: nn.Module, *, is_first: bool) -> None:
        """Run a block as it is now on the pruned path."""
        with self.ready(block) as ready:
            self._run(layer, ready, self._source(layer, is_first), self._rows("pruned", layer + 1))

    @contextmanager
    def ready(self, block: nn.Module) -> Iterator[nn.Module]:
        """A block with weights as the products want them: itself, or a copy."""
        weights = self._pass.weights_dtype
        is_ready = weights is None or next(block.parameters()).dtype == weights
        yield block if is_ready else copy.deepcopy(block).to(weights)

    def show(self, layer: int, block: nn.Module, rows: slice, *, is_first: bool) -> None:
        """Run a block on some sequences of the pruned path, for those who look on."""
        with torch.no_grad():
            self._pass.run(layer, block, self._source(layer, is_first)[rows])

    def show_behind(self) -> None:
        """Run what lies behind the last block on the pruned path, for those who look on."""
        states = self._rows("pruned", self._decoder.layers)
        with torch.no_grad(), self._decoder.outside(self._pass.weights_dtype, is_behind=True):
            for rows in self._steps:
                for tokens in states[rows].flatten(0, 1)[:, None].split(self._pass.logit_tokens):
                    self._pass.logits(tokens)  # each token a sequence of its own: heads know no positions

    def parts(self) -> Iterator[tuple[slice, bool]]:
        """The sequences in steps, and whether they are kept aside (`held_out`)."""
        aside = len(self._ids) - len(held_out(self._ids))
        for rows in self._steps:
            for begin, end, is_held_out in (
                (rows.start, min(rows.stop, aside), False),
                (max(rows.start, aside), rows.stop, True),
            ):
                if begin < end:
                    yield slice(begin, end), is_held_out

    def fit(self, layer: int, block: nn.Module, groups: Sequence[Group], *, is_first: bool) -> tuple[str, Outcome]:
        """Fit the MLP of a block, in place, and go one block on along the pruned path.

        Args:
            layer: its number; `advance_dense` has run it.
            block: the block, cut and refitted if it is to be.
            groups: its groups.
            is_first: it is the first one that is cut, so that it reads the dense path.

        Returns:
            Name of the MLP, and how the fit went.
        """
        names = mlp_names(self._decoder.config, groups)
        mlp = nn.Sequential(*(block.get_submodule(name) for name in names))
        read, target = self._rows("read", layer, self._pass.dtype), self._rows("target", layer)
        is_last = layer == self._decoder.layers - 1
        aim: Aim = Divergence(self._pass) if is_last else SquaredError(STEP_TOKENS)
        # each part frees much of other sizes than the next one takes
        return_freed_memory()
        with self._decoder.outside(self._pass.weights_dtype, is_behind=True) if is_last else nullcontext():
            before = self._find_targets(layer, block, mlp, self._source(layer, is_first), read, target, aim)
            return_freed_memory()
            fitted = copy.deepcopy(mlp).float()
            wanted = (target, self._rows("dense", layer + 1)) if aim.reads_dense else (target,)
            with _zeros_kept(fitted) if self._keeps_zeros else nullcontext():
                passes = LAST_PASSES if is_last else self._passes
                batches, steps = self._batches(passes, read, *wanted), self._steps_of(passes, 1 + len(wanted))
                _fit(fitted, batches, steps, aim, before.scale, self._pass.products)
            fitted.to(next(mlp.parameters()).dtype)  # the path goes on with what will be stored
            return_freed_memory()
            after = self._go_on(fitted, layer, read, target, aim)
            is_accepted = after.of_aside < before.of_aside
            if is_accepted:
                mlp.load_state_dict(fitted.state_dict())
            else:
                self._go_on(mlp, layer, read, target, aim)
        self._forget("read", "target", layer=layer)
        outcome = Outcome(
            damping=None,
            is_accepted=is_accepted,
            held_out_error_before=before.of_aside,
            held_out_error=after.of_aside if math.isfinite(after.of_aside) else None,  # a fit may run away
            error=(after if is_accepted else before).of_all,
        )
        # an MLP that is no module of its own is called by its ends, which are Linears with outcomes of their own
        own = names[0] if len(names) == 1 else f"{names[0]}+{names[-1].rpartition('.')[2]}"
        return f"{self._decoder.prefix(layer)}{own}", outcome

    def forget(self, layer: int) -> None:
        """Drop what no later block reads, once this one is remembered."""
        self._forget("dense", "pruned", layer=layer)

    def _find_targets(
        self, layer: int, block: nn.Module, mlp: nn.Sequential, source: Rows, read: Rows, target: Rows, aim: Aim
    ) -> "_Missed":
        """What the MLP of a cut block reads on the pruned path, what it should give, and what it misses of that."""
        weights = self._pass.weights_dtype
        if weights is not None and next(block.parameters()).dtype != weights:
            # hooks go with the modules that run, so the copy is looked at
            block, mlp = copy.deepcopy((block, mlp))
            block.to(weights)
        seen: dict[str, torch.Tensor] = {}

        def note_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen["x"] = inputs[0]

        def note_output(_: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen["y"] = output

        hooks = [mlp[0].register_forward_pre_hook(note_input), mlp[-1].register_forward_hook(note_output)]
        dense, missed = self._rows("dense", layer + 1), _Missed(aim, self._fitting)
        try:
            with torch.no_grad():
                for rows in self._steps:
                    output = self._pass.run(layer, block, source[rows])
                    shape = output.shape
                    read[rows] = seen["x"].reshape(shape)
                    given = seen["y"].float().reshape(shape)
                    of_dense = dense[rows]
                    target[rows] = wanted = of_dense - output + given
                    missed.add(rows, given, wanted, of_dense)
        finally:
            for hook in hooks:
                hook.remove()
        return missed

    def _go_on(self, mlp: nn.Module, layer: int, read: Rows, target: Rows, aim: Aim) -> "_Missed":
        """The pruned path behind the block: what the dense path has there, short of what this MLP misses."""
        dense, output = self._rows("dense", layer + 1), self._rows("pruned", layer + 1)
        final, missed = copy.deepcopy(mlp).to(self._pass.weights_dtype), _Missed(aim, self._fitting)
        with torch.no_grad():
            for rows in self._steps:
                with self._pass.products():
                    given = final(read[rows].to(next(final.parameters()).dtype)).float()
                wanted, of_dense = target[rows], dense[rows]
                output[rows] = of_dense - wanted + given
                missed.add(rows, given, wanted, of_dense)
        output.flush()
        return missed

    def _batches(self, passes: int, *parts: Rows) -> Iterator[tuple[torch.Tensor, ...]]:
        """Shuffled tokens `(S, D)` of the sequences that are fitted, the same ones of each part, in so many passes."""
        at_once = self._shuffled(len(parts))
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(passes):
            sequences = torch.randperm(self._fitting, generator=generator).tolist()
            for begin in range(0, len(sequences), at_once):
                rows = [slice(number, number + 1) for number in sequences[begin : begin + at_once]]
                shuffled = [torch.cat([part[row] for row in rows]).flatten(0, 1) for part in parts]
                for tokens in torch.randperm(len(shuffled[0]), generator=generator).split(STEP_TOKENS):
                    yield tuple(part[tokens] for part in shuffled)

    def _steps_of(self, passes: int, parts: int) -> int:
        whole, rest = divmod(self._fitting, at_once := self._shuffled(parts))
        steps = [-(-count * self._ids.shape[1] // STEP_TOKENS) for count in (at_once, rest)]
        return passes * (whole * steps[0] + steps[1])

    def _shuffled(self, parts: int) -> int:
        """Sequences that are shuffled among each other, of so many parts."""
        return max(1, 2 * SHUFFLED_TOKENS // parts // self._ids.shape[1])

    def _run(self, layer: int, block: nn.Module, source: Rows, output: Rows) -> None:
        with torch.no_grad():
            for rows in self._steps:
                output[rows] = self._pass.run(layer, block, source[rows])
        output.flush()

    def _source(self, layer: int, is_first: bool) -> Rows:
        return self._rows("dense" if is_first else "pruned", layer)

    def _rows(self, what: str, layer: int, dtype: torch.dtype = torch.float32) -> Rows:
        shape = (*self._ids.shape, self._decoder.config.hidden_size)
        return self._journal.rows(self._row_name(what, layer), shape, dtype)

    def _forget(self, *what: str, layer: int) -> None:
        self._journal.forget(*(self._row_name(each, layer) for each in what))

    def _row_name(self, what: str, layer: int) -> str:
        return f"{self._name}-{what}-{layer}" if self._name else f"{what}-{layer}"


class _Missed:
    """Share of its aim that an MLP misses: of all tokens where that costs little, and of those kept aside."""

    def __init__(self, aim: Aim, fitting: int) -> None:
        """The sequences from number `fitting` on are kept aside."""
        self._aim = aim
        self._fitting = fitting
        self._sums = torch.zeros(2, 2, dtype=torch.float64)
        self._tokens = 0

    def add(self, rows: slice, given: torch.Tensor, target: torch.Tensor, dense: torch.Tensor) -> None:
        """Count sequences `(S, T, D)`: what the MLP gives, what it should give, and what leaves the dense block."""
        aside = max(0, self._fitting - rows.start)
        for is_aside, of_rows in enumerate((slice(aside), slice(aside, None))):
            if self._aim.reads_dense and not is_aside:
                continue
            for part in _together(self._aim, *(x[of_rows].flatten(0, 1) for x in (given, target, dense))):
                self._sums[is_aside] += self._aim.lost(*part).double().sum(1)
                self._tokens += len(part[0])

    @property
    def scale(self) -> float:
        """Mean over the tokens of what a loss is a share of."""
        return float(self._sums[:, 1].sum() / self._tokens)

    @property
    def of_all(self) -> float:
        """Share of all tokens that were counted."""
        return self._share(self._sums.sum(0))

    @property
    def of_aside(self) -> float:
        """Share of those kept aside."""
        return self._share(self._sums[1])

    def _share(self, sums: torch.Tensor) -> float:
        missed, scale = sums.tolist()
        return float(missed / max(scale, torch.finfo(torch.float64).tiny))


def fitted_sequences(ids: torch.Tensor) -> int:
    """How many of the sequences `(N, T)` are fitted: all but the last ones, which judge (`JUDGED_TOKENS`)."""
    return len(ids) - min(len(held_out(ids)), -(-JUDGED_TOKENS // ids.shape[1]))


def altered(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Sequences `(N, T)` int64 of which every other one has some of its tokens exchanged for any of the vocabulary.

    The sequences kept aside (`held_out`) stay as they are, since they judge.
    """
    generator = torch.Generator().manual_seed(SEED)
    strangers = torch.randint(vocabulary, ids.shape, generator=generator)
    is_altered = torch.rand(ids.shape, generator=generator) < ALTERED_TOKENS
    is_altered[1::2] = False
    is_altered[len(ids) - len(held_out(ids)) :] = False
    return torch.where(is_altered, strangers, ids)


def mlp_names(config: PreTrainedConfig, groups: Sequence[Group]) -> Sequence[str]:
    """Modules of a block, by their names in it, that one after the other make what the MLP adds to the rest.

    An architecture names them (`mlp`) where they are more than the one module around the Linear that reads channels.

    Raises:
        EdgepruneError: if there are none.
    """
    family = architecture(config.model_type)
    if hasattr(family, "mlp"):
        named: Sequence[str] = family.mlp(config)
    else:
        (inner,) = (group.inner.module for group in groups if group.kind == "channels")
        inside = inner.removeprefix(f"{blocks_name(groups)}.{groups[0].layer}.")
        named = (inside.rpartition(".")[0],)
    if not named or not all(named):
        raise EdgepruneError(
            "refit reconstruct wants an MLP whose output is added to the rest of its block, and this "
            f"{config.model_type} model has none; expected --refit least-squares or none"
        )
    return named


def rate_share(step: int, *, steps: int) -> float:
    """Share of the largest learning rate in a step: a linear rise, and a cosine to zero."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _together(aim: Aim, *parts: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tokens `(S, D)` of each part, as many as an aim compares together."""
    for begin in range(0, len(parts[0]), aim.at_once):
        yield tuple(part[begin : begin + aim.at_once] for part in parts)


@contextmanager
def _zeros_kept(mlp: nn.Module) -> Iterator[None]:
    """Inside, weights that are zero get no gradient, so that Adam, without decay, leaves them at exactly zero."""
    matrices = [parameter for parameter in mlp.parameters() if parameter.ndim > 1]
    mlp.requires_grad_(True)
    hooks = [matrix.register_hook((matrix.detach() != 0).to(matrix.dtype).mul) for matrix in matrices]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fit(
    mlp: nn.Module,
    batches: Iterator[tuple[torch.Tensor, ...]],
    steps: int,
    aim: Aim,
    scale: float,
    products: Callable[[], AbstractContextManager[None]],
) -> None:
    """Fit the matrices and biases of an MLP to its aim, whose losses are shares of this scale, in place."""
    mlp.requires_grad_(True)
    parameters = list(mlp.parameters())
    rates = [LEARNING_RATE * float(p.detach().square().mean().sqrt()) for p in parameters]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)], betas=BETAS, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_share, steps=steps))
    for tokens in batches:
        optimizer.zero_grad()
        for x, *wanted in _together(aim, *tokens):
            with products():
                given = mlp(x.float())
            # Adam does not see the scale of a loss, but for its epsilon
            loss = aim.lost(given.float(), *wanted)[0].sum() / (len(tokens[0]) * scale)
            loss.backward(inputs=parameters)  # the head's weights get no gradient
        optimizer.step()
        schedule.step()
    mlp.requires_grad_(False)
