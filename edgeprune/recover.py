"""Recovery: the cut model, trained as a whole through thin adapters, learns to say what the dense model says.

The last step of "group, estimate, prune, recover" (adaptive fusion, arXiv 2403.10799; LLM-Pruner, arXiv 2305.11627), by
LoRA (arXiv 2106.09685). Every Linear of the blocks, with weight W `(out, in)`, gets two thin matrices, which alone are
trained and in the end added to it, so that the model has the form that it would have without:

    W + (ALPHA / RANK) B A              A `(RANK, in)` random, B `(out, RANK)` zero at first
    min over all A and B of  mean_tokens KL(p || q),   p = softmax(head(dense model)),  q = softmax(head(cut model))

by AdamW on the calibration text, a few sequences a step. The papers train on the right answers of an instruction data
set; here the dense model is the only teacher, as in the refit "reconstruct", and no data set is needed. In contrast to
that refit gradients pass through all blocks, so that the whole cut model is in memory, in float32. Of the activations
autograd keeps what enters each block, and logits come a piece at a time.

The sequences that judge a reconstruction judge here too, as no refit has fitted them: where their divergence does not
fall, the model stays as it was cut and refitted.

The journal remembers

    teacher-L        that block L of the dense model was run; what leaves the last one are rows
    adapters         adapters, Adam's moments and the number of steps, every so many steps
    recover-L        the tensors of block L, adapters added
    recover          how it went; the first two are dropped then
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edgeprune.aims import Divergence
from edgeprune.calibration import Calibration
from edgeprune.journal import Entry, Journal, Rows
from edgeprune.reconstruct import SEED, STEP_TOKENS, Paths, fitted_sequences, rate_share
from edgeprune.refit import MOST_PASSES, read_passes
from edgeprune.shrink import Linear
from edgeprune.statistics import BATCH_TOKENS, HELD_OUT_EVERY, Progress
from edgeprune.streaming import Decoder, Pass, return_freed_memory
from edgeprune_runtime.errors import EdgepruneError

RANK = ALPHA = 16
"""Width of the adapters, and what scales them."""

LEARNING_RATE = 5e-4
"""Largest step of a weight of the adapters. SmolLM2 cut by 20 % (wanda-sp, protect, reconstruct), 56 sequences of 512
tokens of C4, one pass: 1.664 times the dense perplexity on 12 windows of WikiText-2 valid became 1.635, and 0.393 nats
on other text of C4 became 0.382. All weights in place of adapters, at a rate found for them: 1.620, with four times the
memory."""

PASSES = 1
"""How often every token is seen, if nobody says."""

KEPT_STEPS = 8
"""After so many steps the journal gets the adapters: what a killed run loses at most."""

TEACHER, BEFORE, ADAPTERS, RECOVER = "teacher", "before-recover", "adapters", "recover"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of a weight."""


@dataclass(frozen=True)
class Recovery:
    """How a recovery went; divergences are KL(dense || pruned) of the next token on the sequences kept aside, nats.

    Attributes:
        is_accepted: whether the adapters are in the weights; else they are as they were.
        divergence_before: of the model as it was cut and refitted.
        divergence: of the model with the adapters; None if it is not finite.
    """

    is_accepted: bool
    divergence_before: float
    divergence: float | None


def not_recovered(recover: str) -> str:
    """What a plan says of a recovery that was not taken."""
    return f"recover {recover} was tried and not taken: on the sequences kept aside it did not lower the divergence"


def parse_recover(text: str) -> int:
    """The passes over the calibration text that `none`, `lora` or `lora:PASSES` names; 0 for none.

    Raises:
        EdgepruneError: if it is none of these.
    """
    name, colon, passes = text.partition(":")
    if text == "none":
        return 0
    found = read_passes(passes) if colon else PASSES
    if name != "lora" or found is None:
        raise EdgepruneError(
            f"recover {text!r} was not understood; expected none, lora, or lora:PASSES with 1 to {MOST_PASSES} passes, "
            "such as lora:2"
        )
    return found


def ask_teacher(
    model: PreTrainedModel | Decoder,
    calibration: Calibration,
    journal: Journal,
    *,
    dtype: torch.dtype = torch.float32,
    step_tokens: int = BATCH_TOKENS,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Keep what leaves the dense model's last block, for `recover`: one forward pass, one block in memory.

    Args:
        model: the dense model, of which nothing is cut yet.
        calibration: the tokens to train and to judge on.
        journal: keeps it.
        dtype: of the matrix products.
        step_tokens: tokens that go through a block at once.
        progress: told of every block.
    """
    if RECOVER in journal:
        return
    decoder = Decoder.of(model)
    paths = Paths(decoder, calibration.ids, dtype, journal, step_tokens=step_tokens, name=TEACHER)
    for layer in range(decoder.layers):
        progress("dense model", layer, decoder.layers)
        if f"{TEACHER}-{layer}" not in journal:
            paths.advance_dense(layer)
            journal.put(f"{TEACHER}-{layer}", Entry())
        paths.forget(layer)
    progress("dense model", decoder.layers, decoder.layers)


def recover(
    model: PreTrainedModel | Decoder,
    passes: int,
    calibration: Calibration,
    journal: Journal,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda stage, done, total: None,
) -> Recovery:
    """Train adapters of a cut model and add them to its weights, in place, if that helps.

    Args:
        model: the model, cut and refitted; a streamed one reads its blocks from the journal afterwards.
        passes: over the calibration tokens.
        calibration: the tokens that `ask_teacher` has shown to the dense model.
        journal: that of `ask_teacher`; remembers the training.
        dtype: of the matrix products; weights, gradients and sums are float32.
        progress: told of every step.

    Raises:
        EdgepruneError: if no sequences can be kept aside.
    """
    check_sequences(len(calibration.ids))
    decoder = Decoder.of(model)
    paths = Paths(decoder, calibration.ids, dtype, journal, name=TEACHER)
    is_done = RECOVER in journal
    if not is_done:
        student = _Student(decoder, calibration.ids, dtype, paths.dense(decoder.layers))
        journal.put(RECOVER, Entry(facts=asdict(_train(student, decoder, passes, journal, progress))))
    found = Recovery(**journal.facts(RECOVER))
    for layer in range(decoder.layers) if found.is_accepted else ():
        if is_done:
            decoder.release(layer)
        names = decoder.blocks[layer].state_dict()
        decoder.read_from(layer, {name: partial(journal.tensor, f"{RECOVER}-{layer}", name) for name in names})
    journal.forget(ADAPTERS, BEFORE, *(f"{TEACHER}-{layer}" for layer in range(decoder.layers)))
    paths.forget(decoder.layers)
    return found


def check_sequences(sequences: int) -> None:
    """Check that a recovery can do with so many calibration sequences.

    Raises:
        EdgepruneError: if it cannot.
    """
    if sequences < HELD_OUT_EVERY:
        raise EdgepruneError(
            f"recover lora judges itself on one of {HELD_OUT_EVERY} calibration sequences, kept aside, and {sequences} "
            f"leave none; raise --calibration-sequences to {HELD_OUT_EVERY} or more, or use --recover none"
        )


class _Student:
    """All blocks of a cut model in float32, to be trained on what the dense model's last block puts out."""

    def __init__(self, decoder: Decoder, ids: torch.Tensor, dtype: torch.dtype, teacher: Rows) -> None:
        self.blocks = nn.ModuleList(_copies(decoder))
        self.fitting = fitted_sequences(ids)
        self.length_tokens = ids.shape[1]
        self._decoder = decoder
        self._ids = ids
        self._pass = Pass(decoder, ids, dtype)
        self._aim = Divergence(self._pass)
        self._teacher = teacher

    def divergence(self, sequences: Sequence[int], *, learns: bool = False) -> float:
        """KL(dense || student), mean over the tokens of some sequences, nats; gradients go to the adapters."""
        with torch.set_grad_enabled(learns), self._decoder.outside(self._pass.weights_dtype):
            hidden = self._outputs(sequences)
            given = hidden.detach().flatten(0, 1)
            dense = torch.cat([self._teacher[slice(number, number + 1)] for number in sequences]).flatten(0, 1)
            gradient, total = torch.zeros_like(given), 0.0
            for begin in range(0, len(given), self._aim.at_once):
                part = slice(begin, begin + self._aim.at_once)
                x = given[part].requires_grad_(learns)
                # as of an MLP that is the whole model: it should give all that leaves the dense model's last block
                nats = self._aim.lost(x, dense[part], dense[part])[0].sum() / len(given)
                total += nats.item()
                if learns:
                    (gradient[part],) = torch.autograd.grad(nats, x)
        if learns:
            hidden.backward(gradient.view_as(hidden))
        return total

    def judged(self) -> float:
        """The divergence on the sequences kept aside."""
        aside = range(self.fitting, len(self._ids))
        return sum(self.divergence([number]) for number in aside) / len(aside)

    def _outputs(self, sequences: Sequence[int]) -> torch.Tensor:
        """What leaves the last block `(S, T, D)` float32; a gradient runs every block once more on what enters it."""
        hidden = self._decoder.embed(self._ids[list(sequences)])[0]
        for layer, block in enumerate(self.blocks):
            hidden = checkpoint(self._run, layer, block, hidden, use_reentrant=False, preserve_rng_state=False)
        return hidden

    def _run(self, layer: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return_freed_memory()  # what is kept of a block lies between what is freed: 0.7 GB of SmolLM2's 1.9
        return self._pass.run(layer, block, hidden)


def _copies(decoder: Decoder) -> Iterator[nn.Module]:
    for layer in range(decoder.layers):
        with decoder.block(layer) as block:
            yield copy.deepcopy(block).float()


def _train(student: _Student, decoder: Decoder, passes: int, journal: Journal, progress: Progress) -> Recovery:
    """Train a student, and put its weights into the model if they are better."""
    before = float(journal.remember(BEFORE, lambda: Entry(facts=student.judged())).facts)
    with _adapters(student.blocks) as adapters:
        _fit(student, adapters, passes, journal, progress)
    for block, stored in zip(student.blocks, decoder.blocks, strict=True):
        for weight, of_stored in zip(block.parameters(), stored.parameters(), strict=True):
            weight.data = weight.data.to(of_stored.dtype).float()  # what will be stored is judged
    after = student.judged()
    is_accepted = after < before
    for layer, block in enumerate(student.blocks) if is_accepted else ():
        with decoder.block(layer) as stored:
            stored.load_state_dict(block.state_dict())
            journal.put(f"{RECOVER}-{layer}", Entry(decoder.finite_tensors(layer, "the recovered model")))
    return Recovery(is_accepted, before, after if math.isfinite(after) else None)


@contextmanager
def _adapters(blocks: nn.ModuleList) -> Iterator[Mapping[str, nn.Parameter]]:
    """Inside, the Linears of blocks have adapters, whose weights are the only ones to train; then they are added."""
    from peft import LoraConfig  # an extra, which only those install who recover
    from peft.tuners.lora import LoraModel

    linears = {name: module for name, module in blocks.named_modules() if isinstance(module, Linear)}
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(linears),
        fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears.values()),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator alone
        torch.manual_seed(SEED)
        adapted = LoraModel(blocks, config, "default")
    yield {name: weight for name, weight in blocks.named_parameters() if weight.requires_grad}
    adapted.merge_and_unload()


def _fit(
    student: _Student, adapters: Mapping[str, nn.Parameter], passes: int, journal: Journal, progress: Progress
) -> None:
    """Train adapters, from the step that the journal remembers."""
    at_once = max(1, STEP_TOKENS // student.length_tokens)
    generator = torch.Generator().manual_seed(SEED)
    orders = (torch.randperm(student.fitting, generator=generator) for _ in range(passes))
    steps = [step.tolist() for order in orders for step in order.split(at_once)]
    optimizer = torch.optim.AdamW(adapters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    done = _take_up(optimizer, adapters, journal.entry(ADAPTERS)) if ADAPTERS in journal else 0
    for number in range(done, len(steps)):
        progress("steps", number, len(steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate_share(number, steps=len(steps))
        optimizer.zero_grad()
        student.divergence(steps[number], learns=True)
        optimizer.step()
        done = number + 1
        if done % KEPT_STEPS == 0 or done == len(steps):
            journal.put(ADAPTERS, Entry(_kept(optimizer, adapters), {"done": done, "steps": len(steps)}))
    progress("steps", len(steps), len(steps))


def _kept(optimizer: torch.optim.AdamW, adapters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The adapters and Adam's moments, by name."""
    moments = {
        f"{name}.{moment}": optimizer.state[adapters[name]][moment]
        for name, moment in itertools.product(adapters, MOMENTS)
    }
    return moments | {name: weight.detach() for name, weight in adapters.items()}


def _take_up(optimizer: torch.optim.AdamW, adapters: Mapping[str, nn.Parameter], entry: Entry) -> int:
    """Go on with what `_kept` has kept; the number of steps that are done."""
    done = int(entry.facts["done"])
    for name, weight in adapters.items():
        weight.data = entry.tensors[name]
        moments = {moment: entry.tensors[f"{name}.{moment}"] for moment in MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(done)), **moments}
    return done
