"""How much memory and disk a walk over a model takes, known before a weight is read.

The figures come from shapes alone: of the tensors in the files' headers, of the groups, and of the calibration tokens.
Each phase of a walk holds a few things at once, and the largest phase is what the run needs:

    outside     what lies outside the blocks, and once more in float32 where it is asked for
    block       the weights of the largest block
    Gram        of o_proj's and down_proj's inputs, of two parts of the tokens
    solve       float64 systems of the refit, or of structured OBS
    gradients   float32 weights, their gradients, and sums of these
    step        activations of the tokens that go through a block at once
    zeros       the sums of all Linears' inputs, a float64 system of the largest, and copies of the Linear at hand
    fit         float32 weights of an MLP, their gradients and Adam's moments; tokens that are shuffled
    candidate   a block that is refitted and cut, and what the dense model and the candidate put out: judging widths; a
                whole cut model, refitted pieces of others, and hidden states between all blocks: searching for them
    recovery    all blocks in float32, adapters with gradients and Adam's moments, hidden states between all blocks

They are estimates on the safe side; a test and a benchmark hold them against what is measured.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from edgeprune.candidates import judging_sequences
from edgeprune.groups import Group
from edgeprune.reconstruct import SHUFFLED_TOKENS, STEP_TOKENS
from edgeprune.recover import MOMENTS, RANK
from edgeprune.shrink import Linear, linear_shapes
from edgeprune.sparsify import Scope
from edgeprune.statistics import BATCH_TOKENS, HELD_OUT_EVERY, WEIGHT_NEEDS, Method
from edgeprune.streaming import LOGIT_BYTES, LOGIT_COPIES, Decoder
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import memory_limit_bytes
from edgeprune_runtime.report import format_bytes

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
LIBRARIES_BYTES = 600 << 20
"""Python, torch and transformers, before a model is there."""

SCORE_MATRICES, REFIT_MATRICES = 2, 3
"""Float64 matrices of all inputs that scores hold at their worst (structured OBS: an inverse and the weights), and a
refit: of both parts of the tokens, and a system that is factored in place."""

STEP_HIDDEN, STEP_INNER = 10, 6
"""Values per token of a step, in multiples of hidden_size and of the inputs of o_proj and down_proj."""

GRADIENT_STEP = 3
"""Activations that autograd keeps, as a multiple of those that a forward step holds."""

CANDIDATES = 4
"""A search holds a whole cut model, and of each o_proj and down_proj what was refitted for a candidate and its options:
up to nine of the one and seven of the other, together less than three models."""

FITTED_COPIES, SHUFFLED_COPIES = 4, 2
"""A reconstruction holds of an MLP's weights, float32: themselves, gradients and Adam's two moments, beside copies in
the precision of the products if that is another; and of the tokens that it shuffles the rows that were read, and those
put together."""

FITTED_STEP = 6
"""Activations of an MLP that autograd keeps, in multiples of what it reads and of its channels."""

ZEROS_MATRICES, ZEROS_COPIES = 6, 8
"""While a Linear gets its zeros: float64 matrices of its inputs (the eigenvectors of ALPS, and what LAPACK works in),
and float32 ones of its weight (its fits and multipliers, or a refit's residual and directions)."""

ADAPTER_COPIES = 6
"""Of the adapters of a recovery: their weights, gradients and Adam's two moments, and what AdamW computes on the way;
what was drawn is still there as a run continues."""

BLOCK_COPIES = 2
"""While a candidate's block is made: the dense one, and its copy that is refitted and cut."""


@dataclass(frozen=True)
class Sizes:
    """What the estimates are made of.

    Attributes:
        outside_bytes: what lies outside the blocks, as stored.
        outside_parameters: number of its values.
        behind_parameters: number of those without an embedding that is not the head as well.
        block_bytes: the largest block, as stored.
        block_parameters: number of its values.
        mlp_parameters: number of values of its Linears that have channels.
        blocks_bytes: all blocks, as stored.
        layers: number of blocks.
        hidden_size: width of the hidden states.
        vocabulary: width of the logits.
        inner: inputs of each Linear that reads units, in the widest block.
        linear_parameters: number of values of the largest Linear of a block.
        linear_lines: inputs and outputs of all Linears of a block, added up, of the block that has most.
        sequences: calibration sequences.
        length_tokens: tokens of each.
    """

    outside_bytes: int
    outside_parameters: int
    behind_parameters: int
    block_bytes: int
    block_parameters: int
    mlp_parameters: int
    blocks_bytes: int
    layers: int
    hidden_size: int
    vocabulary: int
    inner: tuple[int, ...]
    linear_parameters: int
    linear_lines: int
    sequences: int
    length_tokens: int

    @classmethod
    def of(cls, decoder: Decoder, sequences: int, length_tokens: int) -> "Sizes":
        """Sizes of a decoder, whose blocks need not be in memory."""
        blocks = [list(block.parameters()) for block in decoder.blocks]
        inside = {id(parameter) for block in blocks for parameter in block}
        outside = [parameter for parameter in decoder.model.parameters() if id(parameter) not in inside]
        return cls(
            outside_bytes=_bytes(outside),
            outside_parameters=sum(parameter.numel() for parameter in outside),
            behind_parameters=sum(p.numel() for p in outside if id(p) not in decoder.embedding_alone),
            block_bytes=max(map(_bytes, blocks)),
            block_parameters=max(sum(parameter.numel() for parameter in block) for block in blocks),
            mlp_parameters=max(_mlp_parameters(decoder).values()),
            blocks_bytes=sum(map(_bytes, blocks)),
            layers=decoder.layers,
            hidden_size=decoder.config.hidden_size,
            vocabulary=decoder.config.get_text_config().vocab_size,
            inner=_inner(decoder.groups),
            linear_parameters=max(shape.parameters for shape in linear_shapes(decoder.model, decoder.groups).values()),
            linear_lines=max(map(_linear_lines, decoder.blocks)),
            sequences=sequences,
            length_tokens=length_tokens,
        )

    @property
    def gram_bytes(self) -> int:
        """Gram matrices of one block, float32, of one part of the tokens."""
        return FLOAT32_BYTES * sum(inputs**2 for inputs in self.inner)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all calibration tokens, float32."""
        return FLOAT32_BYTES * self.sequences * self.length_tokens * self.hidden_size

    @property
    def judged_bytes(self) -> int:
        """Hidden states of the tokens that widths are judged on, float32."""
        sequences = judging_sequences(self.sequences // HELD_OUT_EVERY, self.length_tokens)
        return FLOAT32_BYTES * sequences * self.length_tokens * self.hidden_size

    @property
    def adapter_bytes(self) -> int:
        """Adapters of all blocks, float32."""
        return FLOAT32_BYTES * RANK * self.linear_lines * self.layers

    @property
    def logit_bytes(self) -> int:
        """Logits of as many tokens of a sequence as are looked at together, and what the loss makes of them."""
        return min(LOGIT_BYTES, LOGIT_COPIES * FLOAT32_BYTES * self.length_tokens * self.vocabulary)

    def step_bytes(self, tokens: int) -> int:
        """Activations of one forward step."""
        return FLOAT32_BYTES * tokens * (STEP_HIDDEN * self.hidden_size + STEP_INNER * sum(self.inner))


@dataclass(frozen=True)
class Work:
    """What a run does, as far as its memory depends on it.

    Attributes:
        method: the importance method.
        refits: whether the refit follows.
        dtype: of the statistics' matrix products.
        graded: sequences that the gradients see.
        judges: the allocation judges candidates.
        compares: it does so by the scores of other methods as well.
        searches: the allocation holds whole candidates in memory.
        reconstructs: the MLPs are reconstructed after the refit.
        recovers: the cut model is trained as a whole.
        zeros: "mlp" or "all" Linears get zeros; None for none.
        sums_products: they get them by all products of their inputs.
    """

    method: Method
    refits: bool
    dtype: torch.dtype
    graded: int
    judges: bool = False
    compares: bool = False
    searches: bool = False
    reconstructs: bool = False
    recovers: bool = False
    zeros: Scope | None = None
    sums_products: bool = False


@dataclass(frozen=True)
class Footprint:
    """How a run stays within its memory.

    Attributes:
        step_tokens: tokens that go through a block at once.
        keeps_blocks: all blocks fit beside the work, and stay in memory.
        peak_bytes: the most that the run takes.
        scratch_bytes: the most that its journal takes on disk.
    """

    step_tokens: int
    keeps_blocks: bool
    peak_bytes: int
    scratch_bytes: int


def phases(sizes: Sizes, work: Work, step_tokens: int) -> dict[str, int]:
    """Bytes that each phase of a run holds at once."""
    always = LIBRARIES_BYTES + sizes.outside_bytes
    casts = work.dtype != torch.bfloat16
    head = FLOAT32_BYTES * sizes.behind_parameters if casts else 0
    weights = max(sizes.block_bytes, FLOAT32_BYTES * sizes.block_parameters if casts else 0)
    reads_inputs = work.refits or work.judges or "inputs" in work.method.needs
    grams = 2 * sizes.gram_bytes if reads_inputs else 0
    matrix = FLOAT64_BYTES * max(sizes.inner) ** 2
    step = sizes.step_bytes(step_tokens)
    found = {
        "the first and last layer in float32": always + FLOAT32_BYTES * sizes.outside_parameters,
        "the statistics of a block": always + weights + grams + max(step, sizes.gram_bytes),
    }
    if work.compares or "inputs" in work.method.needs:
        found["the scores of a block"] = always + weights + grams + SCORE_MATRICES * matrix
    if work.refits:
        found["the refit of a block"] = always + weights + grams + REFIT_MATRICES * matrix
    if work.zeros is not None:
        read = (sizes.hidden_size,)  # by the Linears that make units, in the MLP and in attention
        inputs = (*read, max(sizes.inner)) if work.zeros == "mlp" else (*read, *read, *sizes.inner)
        products = 2 * FLOAT32_BYTES * sum(count**2 for count in inputs) if work.sums_products else 0
        system = ZEROS_MATRICES * matrix if work.sums_products else 0
        copies = ZEROS_COPIES * FLOAT32_BYTES * sizes.linear_parameters
        found["the zeros of a block"] = always + sizes.block_bytes + weights + products + max(step, system + copies)
    if work.reconstructs:
        tokens = min(SHUFFLED_TOKENS, sizes.sequences * sizes.length_tokens)
        shuffled = SHUFFLED_COPIES * (work.dtype.itemsize + FLOAT32_BYTES) * tokens * sizes.hidden_size
        copies = FITTED_COPIES if casts else FITTED_COPIES + 1
        fitted = copies * FLOAT32_BYTES * sizes.mlp_parameters
        activations = FLOAT32_BYTES * STEP_TOKENS * (sizes.hidden_size + max(sizes.inner))
        fit_step = fitted + shuffled + FITTED_STEP * activations
        found["the reconstruction of a block"] = always + sizes.block_bytes + max(fit_step, weights + step)
        logits = min(LOGIT_BYTES, LOGIT_COPIES * FLOAT32_BYTES * STEP_TOKENS * sizes.vocabulary)
        dense = SHUFFLED_COPIES * FLOAT32_BYTES * (2 * tokens // 3) * sizes.hidden_size
        last = max(fit_step - shuffled // 3 + dense + logits, weights + step)
        found["the reconstruction of the last block"] = always + sizes.block_bytes + head + last
    if work.graded:
        needs = work.method.needs
        # weights; gradients of a step and their sum, where the method reads them; the sum of their squares
        copies = 4 if "fisher" in needs else 3 if needs & WEIGHT_NEEDS else 1
        gradients = copies * FLOAT32_BYTES * sizes.block_parameters
        found["the gradients of a block"] = always + gradients + GRADIENT_STEP * step
        found["the loss"] = always + head + sizes.logit_bytes
    if work.judges:
        outputs = 3 * sizes.judged_bytes  # the dense model's, and what a block of the candidate reads and gives
        refit = sizes.block_bytes + grams + REFIT_MATRICES * matrix
        made = max(BLOCK_COPIES * sizes.block_bytes, refit, sizes.block_bytes + weights, weights + step)
        found["the judging of a block"] = always + outputs + made
        found["the judging of a cut"] = always + outputs + head + sizes.logit_bytes
    if work.searches:
        models = CANDIDATES * work.dtype.itemsize * sizes.block_parameters * sizes.layers
        states = FLOAT32_BYTES * step_tokens * sizes.hidden_size * (sizes.layers + 1) + sizes.judged_bytes
        block = BLOCK_COPIES * sizes.block_bytes
        # options are refitted while the candidate's block waits with all that its gradient needs
        option = GRADIENT_STEP * step + grams + REFIT_MATRICES * matrix
        found["the search over widths"] = always + models + block + states + max(option, sizes.logit_bytes)
    if work.recovers:
        tokens = max(STEP_TOKENS, sizes.length_tokens)
        models = FLOAT32_BYTES * sizes.block_parameters * sizes.layers + ADAPTER_COPIES * sizes.adapter_bytes
        # what enters each block; and of what leaves the last: it, the dense model's, and the gradient
        states = FLOAT32_BYTES * tokens * sizes.hidden_size * (sizes.layers + 4)
        ends = FLOAT32_BYTES * sizes.outside_parameters + sizes.logit_bytes
        block = max(BLOCK_COPIES * sizes.block_bytes, GRADIENT_STEP * sizes.step_bytes(tokens))
        found["the recovery of the whole model"] = always + models + states + ends + block
    return found


def scratch_bytes(sizes: Sizes, work: Work) -> int:
    """Bytes that the journal takes on disk at its worst."""
    # the blocks that are cut stay beside those with zeros, so that either walk can be continued
    models = 1 + (work.zeros is not None) + work.recovers
    kept = max(_moments_bytes(sizes, work), models * sizes.blocks_bytes)
    paths = (6 if work.reconstructs else 3) + work.recovers  # what the dense model said lies beside those of the refit
    judged = 3 * sizes.judged_bytes if work.judges else 0
    judged += (1 + len(MOMENTS)) * sizes.adapter_bytes if work.recovers else 0
    return kept + judged + sizes.block_bytes + paths * sizes.hidden_bytes + _inputs_bytes(sizes, work)


def _moments_bytes(sizes: Sizes, work: Work) -> int:
    """The moments of all blocks, where something reads them after the statistics."""
    is_read = work.refits or work.judges or (work.graded and "inputs" in work.method.needs)
    return sizes.layers * sizes.gram_bytes if is_read else 0


def _inputs_bytes(sizes: Sizes, work: Work) -> int:
    """The inputs of all blocks that the gradients go back through."""
    return work.dtype.itemsize * work.graded * sizes.length_tokens * sizes.hidden_size * sizes.layers


def fit(sizes: Sizes, work: Work, limit_bytes: int | None) -> Footprint:
    """How to stay within a limit; without one, within half of what this machine gives where that is possible.

    Raises:
        EdgepruneError: if one block's work does not fit into the limit; or a search or a recovery, which hold whole
            models, into this machine.
    """
    budget = limit_bytes or default_budget()
    limited_by = f"--max-memory {format_bytes(limit_bytes)}" if limit_bytes else ""
    if (work.searches or work.recovers) and limit_bytes is None:
        limit_bytes = machine_bytes()
        limited_by = f"this machine's {format_bytes(limit_bytes)} of memory"
    step_tokens = max(1, min(BATCH_TOKENS // sizes.length_tokens, sizes.sequences)) * sizes.length_tokens
    phase, peak = _largest(phases(sizes, work, step_tokens))
    while limit_bytes is not None and peak > limit_bytes and step_tokens > sizes.length_tokens:
        step_tokens -= sizes.length_tokens
        phase, peak = _largest(phases(sizes, work, step_tokens))
    if limit_bytes is not None and peak > limit_bytes:
        raise EdgepruneError(
            f"{limited_by} does not do: {phase} takes about {format_bytes(peak)}; give that much, or "
            f"{_advice(sizes, work, limit_bytes)}"
        )
    everything = peak + sizes.blocks_bytes
    keeps_blocks = everything <= budget
    return Footprint(
        step_tokens=step_tokens,
        keeps_blocks=keeps_blocks,
        peak_bytes=everything if keeps_blocks else peak,
        scratch_bytes=scratch_bytes(sizes, work),
    )


def _largest(of_phases: Mapping[str, int]) -> tuple[str, int]:
    return max(of_phases.items(), key=lambda item: item[1])


def default_budget() -> int:
    """Half of the memory that this machine has."""
    return machine_bytes() // 2


def machine_bytes() -> int:
    """The memory of this machine, or of the control group we are in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return min(physical, memory_limit_bytes() or physical)


def _advice(sizes: Sizes, work: Work, budget: int) -> str:
    """What would make the work smaller, if anything does."""
    lighter = {
        "use --recover none": (sizes, replace(work, recovers=False)),
        "lower --calibration-tokens": (replace(sizes, length_tokens=64), work),
        "use --dtype bfloat16": (sizes, replace(work, dtype=torch.bfloat16)),
        "use a --method without gradients": (sizes, replace(work, graded=0)),
        "use --allocation judged": (sizes, replace(work, searches=False, compares=False)),
        "use --allocation protect": (sizes, replace(work, judges=False, searches=False, compares=False)),
        "use --refit least-squares": (sizes, replace(work, reconstructs=False)),
        "use --sparsity-scope mlp": (sizes, replace(work, zeros=work.zeros and "mlp")),
        "use --refit none": (sizes, replace(work, refits=False, reconstructs=False)),
        "use --refit none --sparsity-method wanda": (
            sizes,
            replace(work, refits=False, reconstructs=False, sums_products=False),
        ),
        "use --refit none --method magnitude": (
            sizes,
            replace(work, refits=False, reconstructs=False, graded=0, method=Method.parse("magnitude")),
        ),
    }
    helps = (
        advice
        for advice, (other_sizes, other) in lighter.items()
        if max(phases(other_sizes, other, other_sizes.length_tokens).values()) <= budget
    )
    return next(helps, "take a smaller model")


def _inner(groups: Sequence[Group]) -> tuple[int, ...]:
    widest: dict[str, int] = {}
    for group in groups:
        if group.kind != "kv_heads":
            widest[group.kind] = max(widest.get(group.kind, 0), group.units * group.inner.size)
    return tuple(widest.values())


def _mlp_parameters(decoder: Decoder) -> dict[int, int]:
    """Layer -> number of values of the Linears that have channels."""
    groups = [group for group in decoder.groups if group.kind == "channels"]
    shapes = linear_shapes(decoder.model, groups)
    return {
        group.layer: sum(shapes[name].parameters for name in {slot.module for slot in group.slots}) for group in groups
    }


def _linear_lines(block: nn.Module) -> int:
    return sum(sum(module.weight.shape) for module in block.modules() if isinstance(module, Linear))


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
