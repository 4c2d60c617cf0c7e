"""The gates of a model that does not fit into memory: the same comparisons, one decoder block at a time.

    torch    texts flow through the blocks in float32, with weights rounded as the graph has them
             (and, for what rounding costs, once more as the checkpoint has them)
    graph    each block is cut out of the graph that was written, and makes all calls of the parity check, with its
             cache, on what the blocks before it gave

Both sides meet in the logits, and are judged as those of a whole model are. What needs the whole model for every token
is left out: greedy continuations, whose place teacher-forced decoding takes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgeprune.checkpoint import open_decoder
from edgeprune.streaming import Calls, Decoder, return_freed_memory
from edgeprune_export import decoder as decoder_graph
from edgeprune_export import interface
from edgeprune_export.fidelity import Fidelity, fidelity_texts, measure
from edgeprune_export.fidelity import judge as judge_fidelity
from edgeprune_export.golden import golden_positions, golden_texts
from edgeprune_export.parity import (
    Call,
    Comparison,
    ParityResult,
    add_prefill,
    judge,
    parity_calls,
    parity_texts,
    shapes_error,
)
from edgeprune_export.positions import context_tokens
from edgeprune_export.quantize import RoundedWeights, round_weights
from edgeprune_export.reference import Logits
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.golden import GoldenCase
from edgeprune_runtime.session import LOGITS_TO_KEEP, ORT_ERRORS, make_session

STAGE_FILE = ".stage.onnx"
"""A part of a graph, beside it, so that it finds the weights."""

Values = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Checked:
    """What the gates found; `fidelity` is None where nothing is rounded."""

    parity: ParityResult
    fidelity: Fidelity | None
    golden: list[GoldenCase]


def check_by_blocks(
    checkpoint: Path,
    graph: Path,
    rounded: RoundedWeights,
    sequences: Sequence[Sequence[int]],
    on_block: Callable[[float], None] = lambda share: None,
    *,
    parity_only: bool = False,
) -> Checked:
    """Hold a graph of the decoder builder against its checkpoint, with one block of each in memory.

    Args:
        checkpoint: the folder.
        graph: the ONNX file, its external data beside it.
        rounded: the weights that the graph has.
        sequences: token ids; together at least a few hundred.
        on_block: hears the share of the blocks that is done.
        parity_only: ask what the graph computes, and nothing else.

    Raises:
        GateError: if the graph does not compute what the torch model computes, or its weights lose too much.
    """
    precision = rounded.precision
    context = context_tokens(rounded.weights.config)
    texts, judged, golden = (make(sequences, context) for make in (parity_texts, fidelity_texts, golden_texts))
    if parity_only or not precision.is_rounded:
        judged = []
    if parity_only:
        golden = []
    calls = parity_calls(texts, "both", keeps_logits=True)
    parity_count = len(calls)
    for text in judged:
        add_prefill(calls, "fidelity", text)

    exact, as_stored = _TorchSide(), _TorchSide()
    with _outside(checkpoint, rounded) as outside:
        exact.embed(outside, [*texts, *golden])
    if judged:
        with _outside(checkpoint, None) as outside:
            as_stored.embed(outside, judged)
    stages = _GraphSide(graph, rounded, calls)
    stages.embed()
    blocks = open_decoder(checkpoint)
    for layer in range(blocks.layers):
        _run_torch(blocks, layer, rounded, as_stored, exact)
        return_freed_memory()
        stages.run(layer)
        on_block((layer + 1) / (blocks.layers + 1))

    # One side after the other: both heads at once would be the most memory of all.
    with _outside(checkpoint, rounded) as outside:
        references = [exact.logits(outside, index) for index in range(len(texts))]
        cases = [_golden_case(ids, exact.logits(outside, len(texts) + index)) for index, ids in enumerate(golden)]
    expected: list[Logits] = []
    if judged:
        with _outside(checkpoint, None) as outside:
            expected = [as_stored.logits(outside, index) for index in range(len(judged))]
    tolerance, max_kl = precision.tolerances
    comparison = Comparison(tolerance, max_kl)
    fidelity = None
    with stages.head() as head:
        for index, call in enumerate(calls[:parity_count]):
            comparison.add_call(call, references, head(index))
        parity = comparison.result(0, 0)
        judge(graph, parity)
        if judged:
            found = (head(parity_count + index)[0] for index in range(len(judged)))
            fidelity = judge_fidelity(measure(judged, zip(expected, found, strict=True)), precision)
    on_block(1.0)
    return Checked(parity, fidelity, cases)


def _run_torch(
    blocks: Decoder, layer: int, rounded: RoundedWeights, as_stored: "_TorchSide", exact: "_TorchSide"
) -> None:
    """Go through a torch block on both paths; nothing holds it afterwards."""
    with blocks.block(layer, torch.float32) as block, torch.inference_mode():
        as_stored.run(blocks, layer, block)
        round_weights(block, rounded, blocks.prefix(layer))
        exact.run(blocks, layer, block)


@contextmanager
def _outside(checkpoint: Path, rounded: RoundedWeights | None) -> Iterator[Decoder]:
    """What lies outside the blocks, in float32, rounded or as stored, for as long as the code inside runs."""
    return_freed_memory()
    found = open_decoder(checkpoint)
    found.load_outside()
    with torch.inference_mode():
        for parameter in found.model.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.float()  # and what is stored may go
        if rounded is not None:
            round_weights(found.model, rounded)
        return_freed_memory()
        yield found
    torch.nn.Module.to(found.model, device="meta")
    return_freed_memory()


class _TorchSide:
    """The hidden states of texts on their way through the blocks, `(1, T, D)` float32 each."""

    def __init__(self) -> None:
        self._hidden: list[torch.Tensor] = []
        self._calls: list[Calls] = []

    def embed(self, outside: Decoder, texts: Sequence[Sequence[int]]) -> None:
        """Begin with texts."""
        for text in texts:
            hidden, calls = outside.embed(torch.tensor([list(text)]))
            self._hidden.append(hidden)
            self._calls.append(calls)

    def run(self, decoder: Decoder, layer: int, block: torch.nn.Module) -> None:
        """Go through a block."""
        for index, calls in enumerate(self._calls):
            self._hidden[index] = decoder.run(layer, block, self._hidden[index], calls)

    def logits(self, outside: Decoder, index: int) -> Logits:
        """Logits (T, V) of a text that is through."""
        found: Logits = outside.logits(self._hidden[index])[0].float().numpy()
        return found


class _GraphSide:
    """What the calls of a graph have come to, part by part."""

    def __init__(self, graph: Path, rounded: RoundedWeights, calls: Sequence[Call]) -> None:
        self._graph = graph
        self._calls = calls
        self._widths = rounded.weights.layer_widths()
        self._model = ir.load(graph)
        self._dtype = next(
            value.dtype for value in self._model.graph.inputs if value.name == interface.past_name(0, "key")
        )
        self._boundaries = decoder_graph.boundaries(self._model, len(self._widths))
        hidden_size = rounded.weights.config.hidden_size
        shape = ("batch_size", "sequence_length", hidden_size)
        for value in ir.convenience.create_value_mapping(self._model.graph).values():
            if value.name in {name for names in self._boundaries for name in names}:
                assert self._dtype is not None, "inputs of a graph have types"
                interface.describe(value, value.name, self._dtype, shape)
        self._flow: list[Values] = []

    def embed(self) -> None:
        """Look the tokens of every call up."""
        names = self._boundaries[0]
        with self._stage(["input_ids"], names) as run:
            self._flow = [run({"input_ids": call.ids}) for call in self._calls]

    def run(self, layer: int) -> None:
        """Let every call go through a block."""
        before, after = self._boundaries[layer], self._boundaries[layer + 1]
        pasts = [interface.past_name(layer, part) for part in interface.PARTS]
        presents = [interface.present_name(layer, part) for part in interface.PARTS]
        width = self._widths[layer]
        caches: list[list[NDArray[np.generic]]] = []
        assert self._dtype is not None, "inputs of a graph have types"
        with self._stage(["input_ids", "attention_mask", *before, *pasts], [*after, *presents]) as run:
            for index, call in enumerate(self._calls):
                empty = np.zeros((len(call.ids), width.kv_heads, 0, width.head_dim), self._dtype.numpy())
                cache = [empty, empty] if call.before is None else caches[call.before]
                feeds: Values = {"input_ids": call.ids, "attention_mask": call.mask, **self._flow[index]}
                found = run(feeds | dict(zip(pasts, cache, strict=True)))
                caches.append([found.pop(name) for name in presents])
                self._flow[index] = found

    @contextmanager
    def head(self) -> Iterator[Callable[[int], Logits]]:
        """What gives the logits (B, T, V) of a call, for as long as the code inside runs."""
        with self._stage(list(self._boundaries[-1]), ["logits"]) as run:
            yield lambda index: run({**self._flow[index], **self._calls[index].switches})["logits"].astype(
                np.float32, copy=False
            )

    @contextmanager
    def _stage(self, inputs: Sequence[str], outputs: Sequence[str]) -> Iterator[Callable[[Values], Values]]:
        """A part of the graph in a session."""
        part = ir.convenience.extract(self._model.graph, inputs, outputs)
        if (switch := part.initializers.get(LOGITS_TO_KEEP)) is not None:
            part.inputs.append(switch)  # of which extracting makes a constant
        file = self._graph.with_name(STAGE_FILE)
        ir.save(ir.Model(part, ir_version=self._model.ir_version), file)
        try:
            session = make_session(file, keeps_memory=False)
        except EdgepruneError as error:
            raise GateError(f"parity of {self._graph.name} failed: {error}") from error
        finally:
            file.unlink()

        def run(feeds: Values) -> Values:
            try:
                # only dense tensors come out of these graphs; ONNX Runtime's own type allows for every kind of value
                found = cast("list[NDArray[np.generic]]", session.run(list(outputs), feeds))
            except ORT_ERRORS as error:
                raise shapes_error(self._graph, error) from error
            return dict(zip(outputs, found, strict=True))

        yield run


def _golden_case(ids: Sequence[int], logits: Logits) -> GoldenCase:
    """A case whose greedy continuation ends with its first token, the only one that is known."""
    positions = golden_positions(ids)
    return GoldenCase(np.array(ids, np.int64), positions, logits[positions], logits[-1:].argmax(-1))
