"""Semi-structured sparsity: the weights of a model get zeros in a pattern, block by block.

The order of SparseGPT, Wanda and DaSS: a block is run on what the blocks before it give *with their zeros*; what its
Linears read is summed up; they all lose weights from these sums; and the block is run once more for the next one.

    z_0 = embedding
    sums over the tokens of what the Linears of block_l read, given z_l        one forward pass serves all of them
    a method puts zeros into each Linear (`edgeprune.sparsity`), survivors are refitted (`edgeprune.survivors`)
    z_{l+1} = block_l(z_l)

With the refit "reconstruct" the MLP of every block is fitted as well, to give what the model without zeros gives
(`edgeprune.reconstruct`); zeros stay zeros. In memory at a time is one block with its sums. Every block is a step that
the journal remembers:

    sparse-L         the tensors of block L with their zeros, and how the refit of each Linear went

What a pattern promises is counted where it matters, in the files that are written (`check_pattern`): by
`edgeprune.checkpoint` in the weights, and by `edgeprune_export.sparsity_check` in the graph.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from edgeprune import plugins
from edgeprune.calibration import Calibration
from edgeprune.groups import Group, Side
from edgeprune.inputs import sum_inputs
from edgeprune.journal import Entry, Journal
from edgeprune.patterns import Pattern
from edgeprune.plan import SparsityRecord
from edgeprune.reconstruct import Paths, mlp_names
from edgeprune.refit import Mode, Outcome, parse_refit
from edgeprune.shrink import linear_of, oriented, weight_of
from edgeprune.sparsity import Evidence
from edgeprune.statistics import BATCH_TOKENS, HELD_OUT_EVERY, Progress
from edgeprune.streaming import Decoder
from edgeprune.survivors import refit_survivors
from edgeprune_runtime.errors import EdgepruneError

Scope = Literal["mlp", "all"]
Layout = Literal["hardware", "paper"]
REFITS: Sequence[Mode] = ("none", "least-squares", "reconstruct")


@dataclass(frozen=True)
class Sparsity:
    """How to make a model sparse.

    Attributes:
        pattern: "N:M", N weights kept of M, or the share of zeros.
        method: sparsity method, by name.
        scope: "mlp", or "all" Linears of the blocks.
        layout: "hardware": blocks lie along the inputs, as sparse tensor cores need them; "paper": where the method's
            paper has them.
        refit: what makes up for the zeros: nothing; the survivors of each Linear ("least-squares"); these, and then the
            MLP as a whole ("reconstruct", or "reconstruct:PASSES").
    """

    pattern: str
    method: str = "alps"
    scope: Scope = "mlp"
    layout: Layout = "hardware"
    refit: str = "none"

    def check(self) -> None:
        """Check everything that needs no model.

        Raises:
            EdgepruneError: naming the value that is wrong.
        """
        Pattern.parse(self.pattern)
        method = plugins.find("sparsity", self.method, "sparsity method")
        for option, value, known in (
            ("--sparsity-scope", self.scope, get_args(Scope)),
            ("--sparsity-layout", self.layout, get_args(Layout)),
        ):
            if value not in known:
                raise EdgepruneError(f"unknown {option} {value!r}; expected {' or '.join(known)}")
        if self.layout == "paper" and not hasattr(method, "SIDES"):
            raise EdgepruneError(
                f"--sparsity-layout paper goes with methods whose paper has other blocks than the hardware, and "
                f"{self.method} is none; expected --sparsity-method dass, or --sparsity-layout hardware"
            )
        if self.mode not in REFITS:
            raise EdgepruneError(
                f"refit {self.refit!r} does not know zeros; expected {', '.join(REFITS)} with --sparsity"
            )

    def check_sequences(self, sequences: int) -> None:
        """Check that the refit can do with so many calibration sequences.

        Raises:
            EdgepruneError: if it cannot.
        """
        if self.refit != "none" and sequences < HELD_OUT_EVERY:
            raise EdgepruneError(
                f"refit {self.refit} judges itself on one of {HELD_OUT_EVERY} calibration sequences, kept aside, and "
                f"{sequences} leave none; raise --calibration-sequences to {HELD_OUT_EVERY} or more, or use --refit "
                "none"
            )

    def check_for(self, config: PreTrainedConfig, groups: Sequence[Group]) -> None:
        """Check what the architecture alone decides.

        Raises:
            EdgepruneError: if its MLPs cannot be reconstructed, and are to be.
        """
        if self.mode == "reconstruct":
            mlp_names(config, next(_layers(groups)))

    @property
    def mode(self) -> Mode:
        """The mode of the refit."""
        return parse_refit(self.refit)[0]

    @property
    def needs(self) -> frozenset[str]:
        """What is summed up over the inputs: "inputs" (their squares), "gram" (all their products), or nothing."""
        needs: frozenset[str] = plugins.find("sparsity", self.method, "sparsity method").NEEDS
        return needs if self.refit == "none" else needs | {"gram"}

    def record(self, groups: Sequence[Group]) -> SparsityRecord:
        """What the plan keeps of it, for a model with these groups."""
        sides: dict[str, Side] = {}
        for layer in _layers(groups):
            sides |= self.sides(layer)
        return SparsityRecord(**asdict(self), sides=sides)

    def notes(self, groups: Sequence[Group]) -> tuple[str, ...]:
        """What a person should know who chose this method for a model with these groups."""
        method = plugins.find("sparsity", self.method, "sparsity method")
        if not hasattr(method, "notes"):
            return ()
        has_gate = bool(_gates(next(iter(_layers(groups)))))
        found: tuple[str, ...] = method.notes(self.layout, self.scope, has_gate=has_gate)
        return found

    def sides(self, groups: Sequence[Group]) -> dict[str, Side]:
        """Name of each Linear of a block that gets zeros -> the side along which blocks lie."""
        method = plugins.find("sparsity", self.method, "sparsity method")
        of_gates: Side = getattr(method, "SIDES", {}).get(self.layout, "in")
        gates = _gates(groups)
        scope = [group for group in groups if self.scope == "all" or group.kind == "channels"]
        names = dict.fromkeys(slot.module for group in scope for slot in group.slots)
        return {name: of_gates if name in gates else "in" for name in names}


def default_refit(method: str) -> Mode:
    """What makes up for the zeros of a method, if nobody says: nothing where it has fitted what stays.

    Never "reconstruct": on top of ALPS, SmolLM2 has a tenth less perplexity and loses a third of its accuracy on
    LAMBADA, which is too much of the calibration text.

    Raises:
        EdgepruneError: if there is no such method.
    """
    found: Mode = getattr(plugins.find("sparsity", method, "sparsity method"), "REFIT", "least-squares")
    return found


def _layers(groups: Sequence[Group]) -> Iterator[list[Group]]:
    return (list(members) for _, members in itertools.groupby(groups, lambda group: group.layer))


def _gates(groups: Sequence[Group]) -> set[str]:
    """The Linears of a block that make the channels of a gated MLP; none if it has no gate."""
    makers = [slot.module for slot in _channels(groups).slots if slot.side == "out"]
    return set(makers) if len(makers) > 1 else set()


def _channels(groups: Sequence[Group]) -> Group:
    return next(group for group in groups if group.kind == "channels")


def sparsify(
    model: PreTrainedModel | Decoder,
    sparsity: Sparsity,
    calibration: Calibration,
    *,
    dtype: torch.dtype = torch.float32,
    step_tokens: int = BATCH_TOKENS,
    journal: Journal | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Outcome]:
    """Put zeros into a model, in place, block by block.

    Args:
        model: the model, cut already if it is to be; a streamed one reads its blocks from the journal afterwards.
        sparsity: how.
        calibration: the tokens that the sums are over.
        dtype: of the matrix products.
        step_tokens: tokens that go through a block at once.
        journal: remembers every block that is done; in memory by default.
        progress: told of every block.

    Returns:
        Name of each refitted Linear, and of each reconstructed MLP -> how that went.
    """
    sparsity.check()
    sparsity.check_sequences(len(calibration.ids))
    decoder, journal = Decoder.of(model), Journal() if journal is None else journal
    sparsity.check_for(decoder.config, decoder.groups)
    walk = _Walk(decoder, sparsity, calibration.ids, dtype, journal, step_tokens)
    outcomes: dict[str, Outcome] = {}
    for layer in range(decoder.layers):
        progress("sparsity", layer, decoder.layers)
        step = f"sparse-{layer}"
        if step in journal:
            decoder.release(layer)
        else:
            journal.put(step, walk.block(layer))
        names = decoder.blocks[layer].state_dict()
        decoder.read_from(layer, {name: partial(journal.tensor, step, name) for name in names})
        outcomes |= {name: Outcome(**facts) for name, facts in journal.facts(step).items()}
        walk.paths.forget(layer)
    walk.paths.forget(decoder.layers)
    progress("sparsity", decoder.layers, decoder.layers)
    return outcomes


class _Walk:
    """Goes through a model block by block, zeros behind it."""

    def __init__(
        self,
        decoder: Decoder,
        sparsity: Sparsity,
        ids: torch.Tensor,
        dtype: torch.dtype,
        journal: Journal,
        step_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._sparsity = sparsity
        self._pattern = Pattern.parse(sparsity.pattern)
        self._method = plugins.find("sparsity", sparsity.method, "sparsity method")
        self._reads = sparsity.needs
        self._groups = list(_layers(decoder.groups))
        self.paths = Paths(
            decoder,
            ids,
            dtype,
            journal,
            passes=parse_refit(sparsity.refit)[1],
            step_tokens=step_tokens,
            name="sparse",
            keeps_zeros=True,
        )

    def block(self, layer: int) -> Entry:
        """The tensors of a block with their zeros, in place, and how the refit of each Linear went."""
        reconstructs = self._sparsity.mode == "reconstruct"
        if reconstructs:
            self.paths.advance_dense(layer)
        elif layer == 0 and self._reads:
            self.paths.embed()
        with self._decoder.block(layer) as block:
            outcomes = dict(self._prune(layer, block))
            if reconstructs:
                name, outcome = self.paths.fit(layer, block, self._groups[layer], is_first=layer == 0)
                outcomes[name] = outcome
            elif self._reads:
                self.paths.advance_pruned(layer, block, is_first=layer == 0)
            tensors = self._decoder.finite_tensors(layer, "the sparse model")
            return Entry(tensors, {name: asdict(outcome) for name, outcome in outcomes.items()})

    def _prune(self, layer: int, block: nn.Module) -> Iterator[tuple[str, Outcome]]:
        """Put zeros into the Linears of a block; of each that is refitted, how that went."""
        sides = self._sparsity.sides(self._groups[layer])
        inner = _channels(self._groups[layer]).inner.module
        sums = {}
        if self._reads:
            with_gram = "gram" in self._reads
            sums = sum_inputs(self._decoder, self.paths, layer, block, sides, with_gram=with_gram)
        channels_sq = next((of_inputs.sq_mean for names, of_inputs in sums.items() if inner in names), None)
        for names in list(sums) or [tuple(sides)]:
            found = sums.pop(names, None)  # large: what was looked at may go
            moments = None if found is None else found.moments()
            # what judges a refit must be new to the weights that it is compared with
            seen = moments.fitting() if moments is not None and self._sparsity.refit != "none" else moments
            for name in names:
                linear = linear_of(self._decoder.model, name)
                weight = weight_of(linear).detach().float()
                evidence = Evidence(
                    weight=weight,
                    input_sq_mean=None if found is None else found.sq_mean,
                    gram=None if seen is None else seen.gram,
                    channel_sq_mean=self._of_rows(layer, name, channels_sq),
                )
                sparse: torch.Tensor = self._method.prune(evidence, self._pattern, sides[name])
                if self._sparsity.refit != "none":
                    assert moments is not None
                    sparse, outcome = refit_survivors(weight, sparse, moments)
                    yield name, outcome
                linear.weight.data = oriented(linear, sparse.to(linear.weight.dtype)).contiguous()

    def _of_rows(self, layer: int, name: str, channels_sq: torch.Tensor | None) -> torch.Tensor | None:
        """Mean square of the channel that each row of a gate or up helps to make; None of other Linears."""
        if channels_sq is None or name not in _gates(self._groups[layer]):
            return None
        group = _channels(self._groups[layer])
        rows = channels_sq.new_zeros(weight_of(linear_of(self._decoder.model, name)).shape[0])
        for slot in group.slots:
            if slot.module == name and slot.side == "out":
                rows[slot.all_lines(group.units)] = channels_sq
        return rows
