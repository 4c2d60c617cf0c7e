"""What the calibration tokens say about every block: moments of inputs, loss gradients, and the units' scores.

The model is walked block by block, so that a step needs the weights and gradients of one block only:

    forward    x_0 = embedding;  x_{l+1} = block_l(x_l)      moments of the inputs of o_proj and down_proj on the way
    tail       loss = cross entropy(head(norm(x_L)));  g_L = dloss/dx_L
    backward   for l = L-1 .. 0: recompute block_l(x_l), backpropagate g_{l+1} -> dloss/dW of block_l, g_l
               the gradients become scores at once and are dropped

The gradients equal those of one backward pass through the whole model.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from edgeprune import plugins
from edgeprune.groups import Group, Slot
from edgeprune.importance import Evidence, SlotEvidence
from edgeprune_runtime.errors import EdgepruneError

Progress = Callable[[str, int, int], None]
"""Called with (what happens, steps done, steps in all)."""

BATCH_TOKENS = 4096
"""Tokens of one forward step: enough to keep the matrix units busy, few enough for one block's activations."""

SAMPLES = 8
"""A method that looks at samples sees the sequences in so many parts at least: enough to estimate a variance."""


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one Linear: `gram` `(K, K)` float32 is X^T X / tokens."""

    gram: torch.Tensor


@dataclass(frozen=True)
class Stats:
    """What one pass over the calibration tokens found.

    Attributes:
        moments: module name of each Linear that reads units (o_proj, down_proj) -> moments of its inputs; empty where
            nobody asked for them.
        scores: group name -> float32 `(units,)`, higher = keep.
        loss: mean cross entropy in nats over the tokens the gradients saw; None if the method reads no gradients.
    """

    moments: Mapping[str, Moments]
    scores: Mapping[str, torch.Tensor]
    loss: float | None


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
    def sampled(self) -> tuple[str, ...]:
        """Methods whose scores of single samples this method reads."""
        names: tuple[str, ...] = self.module.sampled(self.argument) if hasattr(self.module, "sampled") else ()
        return names

    def scores(self, group: Group, evidence: Evidence) -> torch.Tensor:
        """Scores of one group: float32 `(units,)`."""
        scores: torch.Tensor = self.module.scores(group, evidence, self.argument)
        return scores


def gather(
    model: Any,
    groups: Sequence[Group],
    ids: torch.Tensor,
    method: Method,
    *,
    with_moments: bool = True,
    dtype: torch.dtype = torch.float32,
    gradient_sequences: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Stats:
    """Moments and scores of every group, from calibration tokens `ids` `(N, T)` int64.

    Args:
        model: the dense model, float32.
        groups: its groups.
        ids: calibration tokens.
        method: the importance method.
        with_moments: gather the moments (the refit reads them) even if the method does not.
        dtype: of the matrix products (float32 or bfloat16); sums are float32 in both.
        gradient_sequences: how many of the sequences the gradients see; all by default. Every block's input is held
            for these.
        progress: told of every block.

    Raises:
        EdgepruneError: if the statistics are not finite (the model or the text is broken).
    """
    walk = BlockWalk(model, groups, ids, dtype)
    wants_gradients = "gradient" in method.needs
    graded = min(gradient_sequences or len(ids), len(ids)) if wants_gradients else 0
    moments: dict[str, Moments] = {}
    scores: dict[str, torch.Tensor] = {}
    hidden = walk.embed()
    block_inputs: list[torch.Tensor] = []
    for layer in range(walk.layers):
        progress("statistics", layer, walk.layers)
        if graded:
            block_inputs.append(hidden[:graded].to(dtype))
        hidden, of_layer = walk.forward(layer, hidden, with_moments=with_moments or "inputs" in method.needs)
        moments |= of_layer
        if not wants_gradients:
            for group in walk.groups[layer]:
                scores[group.name] = method.scores(group, walk.evidence(group, moments))
    progress("statistics", walk.layers, walk.layers)
    loss = None
    if wants_gradients:
        loss, gradient = walk.loss_gradient(hidden[:graded])
        for step, layer in enumerate(reversed(range(walk.layers))):
            progress("gradients", step, walk.layers)
            found, gradient = walk.backward(layer, block_inputs.pop(), gradient, method, moments)
            scores |= found
        progress("gradients", walk.layers, walk.layers)
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise EdgepruneError(
                f"the scores of {name} are not finite; expected finite activations and gradients: "
                "check the model on this text, or calibrate in float32"
            )
    return Stats(moments=moments, scores=scores, loss=loss)


class BlockWalk:
    """Runs a decoder block by block on fixed calibration tokens."""

    def __init__(self, model: Any, groups: Sequence[Group], ids: torch.Tensor, dtype: torch.dtype) -> None:
        self.model = model
        self.ids = ids
        self.dtype = dtype
        self.groups = {
            layer: list(members)
            for layer, members in itertools.groupby(sorted(groups, key=lambda group: group.layer), lambda g: g.layer)
        }
        self.layers = len(self.groups)
        self.blocks_name = blocks_name(groups)
        self.blocks: nn.ModuleList = model.get_submodule(self.blocks_name)
        self._batch = max(1, BATCH_TOKENS // ids.shape[1])
        self._calls: list[dict[str, Any]] = []

    def embed(self) -> torch.Tensor:
        """Input of the first block for all tokens, `(N, T, D)`; notes with which arguments each block is called."""
        recorders = [_StandIn(block) for block in self.blocks]
        with torch.no_grad(), _blocks_replaced(self.model, self.blocks_name, recorders):
            hidden = []
            for rows in self.ids.split(self._batch):
                self.model.base_model(input_ids=rows, use_cache=False)
                hidden.append(recorders[0].hidden)
            self.model.base_model(input_ids=self.ids[:1], use_cache=False)  # arguments that fit a batch of any size
        self._calls = [recorder.arguments for recorder in recorders]
        return torch.cat(hidden)

    def forward(
        self, layer: int, hidden: torch.Tensor, *, with_moments: bool = True
    ) -> tuple[torch.Tensor, dict[str, Moments]]:
        """Output of a block `(N, T, D)` and the moments of the inputs of its Linears that read units."""
        slots = [slot for group in self.groups[layer] for slot in group.slots]
        inner = [slot for slot in slots if slot.side == "in" and with_moments]
        out = torch.empty_like(hidden)
        with torch.no_grad(), _input_sums(self.model, inner) as sums:
            for rows in torch.arange(len(hidden)).split(self._batch):
                out[rows] = self._call(layer, hidden[rows]).to(out.dtype)
        return out, {name: Moments(gram / count) for name, (gram, count) in sums.items()}

    def loss_gradient(self, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean next-token cross entropy over all tokens, and its gradient for the last block's output `(S, T, D)`."""
        gradient = torch.empty(hidden.shape)
        targets = hidden.shape[0] * (hidden.shape[1] - 1)
        loss = 0.0
        for row in range(len(hidden)):
            x = hidden[row : row + 1].float().requires_grad_()
            replays = [_StandIn(block, replay=x) for block in self.blocks]
            with _blocks_replaced(self.model, self.blocks_name, replays), self._precision():
                logits = self.model(input_ids=self.ids[row : row + 1], use_cache=False).logits
            nats = nn.functional.cross_entropy(logits[0, :-1].float(), self.ids[row, 1:], reduction="sum") / targets
            (gradient[row : row + 1],) = torch.autograd.grad(nats, x)
            loss += nats.item()
        return loss, gradient

    def backward(
        self,
        layer: int,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        method: Method,
        moments: Mapping[str, Moments],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Scores of a block's groups, and the loss gradient for its input, from that for its output `(S, T, D)`."""
        groups = self.groups[layer]
        weights = {s.module: _weight(self.model, s) for group in groups for s in group.slots}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        wants_squares = "fisher" in method.needs
        if wants_squares:
            step = 1  # F needs the gradient of every single sequence
        else:
            step = min(self._batch, max(1, len(hidden) // SAMPLES)) if method.sampled else self._batch
        squares = {name: torch.zeros_like(weight) for name, weight in weights.items()} if wants_squares else {}
        samplers = [Method.parse(name) for name in method.sampled]
        samples: dict[str, dict[str, list[torch.Tensor]]] = {g.name: {m.name: [] for m in samplers} for g in groups}
        incoming = torch.empty_like(gradient)
        with _gradients_for(self.model, weights.values()):
            for rows in torch.arange(len(hidden)).split(step):
                x = hidden[rows].float().requires_grad_()
                y = self._call(layer, x).float()
                found = torch.autograd.grad(y, [x, *weights.values()], gradient[rows])
                incoming[rows] = found[0]
                for name, of_weight in zip(weights, found[1:], strict=True):
                    sums[name] += of_weight
                    if wants_squares:
                        # the loss is a mean over S samples; F wants the gradient of each sample's own mean loss
                        squares[name] += (of_weight * len(hidden)).square() / len(hidden)
                if samplers:
                    of_sample = dict(zip(weights, found[1:], strict=True))
                    for group, sampler in itertools.product(groups, samplers):
                        evidence = self.evidence(group, moments, of_sample)
                        samples[group.name][sampler.name].append(sampler.scores(group, evidence))
        scores = {}
        for group in groups:
            of_samples = {name: torch.stack(values) for name, values in samples[group.name].items()}
            scores[group.name] = method.scores(group, self.evidence(group, moments, sums, squares, of_samples))
        return scores, incoming

    def evidence(
        self,
        group: Group,
        moments: Mapping[str, Moments],
        gradients: Mapping[str, torch.Tensor] | None = None,
        squares: Mapping[str, torch.Tensor] | None = None,
        samples: Mapping[str, torch.Tensor] | None = None,
    ) -> Evidence:
        """Evidence of one group, oriented so that dimension 0 is the channel."""
        slots = []
        for slot in group.slots:
            rows = slice(slot.start, slot.start + group.units * slot.size)
            of_inputs = moments.get(slot.module) if slot.side == "in" else None
            slots.append(
                SlotEvidence(
                    slot=slot,
                    weight=_channels(_weight(self.model, slot).detach(), slot, rows),
                    gradient=_channels(gradients[slot.module], slot, rows) if gradients else None,
                    fisher=_channels(squares[slot.module], slot, rows) if squares else None,
                    input_sq_mean=of_inputs.gram.diagonal()[rows] if of_inputs else None,
                )
            )
        return Evidence(tuple(slots), samples or {})

    def _call(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        with self._precision():
            output = self.blocks[layer](hidden, **self._calls[layer])
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def blocks_name(groups: Sequence[Group]) -> str:
    """Module name of the list of decoder blocks, from the slots: `model.layers.3.mlp.up_proj` -> `model.layers`."""
    group = groups[0]
    return group.slots[0].module.partition(f".{group.layer}.")[0]


def _weight(model: Any, slot: Slot) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule(slot.module).weight
    return weight


def _channels(matrix: torch.Tensor, slot: Slot, rows: slice) -> torch.Tensor:
    return (matrix if slot.side == "out" else matrix.T)[rows].float()


class _StandIn(nn.Module):
    """Stands in for a block: keeps what it is called with, and hands on the hidden states, or those given to replay."""

    def __init__(self, block: nn.Module, replay: torch.Tensor | None = None) -> None:
        super().__init__()
        self._modules["block"] = block
        self.replay = replay
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        # models read attributes such as `attention_type` off their blocks
        block = self.__dict__["_modules"]["block"]
        return block if name == "block" else getattr(block, name)

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden if self.replay is None else self.replay


@contextmanager
def _blocks_replaced(model: Any, name: str, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    blocks = getattr(parent, attribute)
    setattr(parent, attribute, nn.ModuleList(stand_ins))
    try:
        yield
    finally:
        setattr(parent, attribute, blocks)


@contextmanager
def _input_sums(model: Any, slots: Sequence[Slot]) -> Iterator[dict[str, tuple[torch.Tensor, int]]]:
    """Per module: X^T X `(K, K)` and the number of tokens, filled while the block inside runs."""
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    hooks = []
    for slot in slots:
        module = model.get_submodule(slot.module)

        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = slot.module) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            gram, count = sums.get(name, (torch.zeros(x.shape[1], x.shape[1]), 0))
            sums[name] = (gram.addmm_(x.T, x), count + len(x))

        hooks.append(module.register_forward_pre_hook(add))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _gradients_for(model: Any, weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """Only these weights ask for gradients inside."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
