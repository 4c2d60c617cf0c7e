"""A decoder whose blocks come into memory one at a time.

    outside    embedding, final norm, head, rotary frequencies: always in memory
    blocks     on torch's meta device: shapes, no values; `block` brings the values of one for as long as it is used

        with decoder.block(3) as block:        # its tensors are read from the checkpoint's files here,
            hidden = decoder.run(3, block, hidden, calls)
                                               # and are gone again here

A model that fits keeps the blocks it has read (`keeps_blocks`), and one that is whole in memory hands them out as they
are (`Decoder.of`): there is one way to walk a model, whatever its size. A walk has three parts, which run the model's
own code with the blocks taken out of it, so that every architecture keeps its own embedding, masks, rotary embedding,
norm and head:

    hidden, calls = decoder.embed(ids)    what enters the first block, and with which arguments each block is called
    hidden = decoder.run(layer, block, hidden, calls)
    logits = decoder.logits(hidden)

Hidden states between blocks are float32. Weights stay as they are stored (bfloat16 takes half the memory) unless
float32 is asked for, as gradients do; products in bfloat16 are the business of torch.autocast around the walk.
"""

import copy
import ctypes
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from edgeprune.configs import architecture, config_groups, quiet_global_reads
from edgeprune.groups import Group, blocks_name
from edgeprune_runtime.errors import EdgepruneError

Reader = Callable[[], torch.Tensor]
"""Reads one tensor from where it is stored."""

LOGIT_BYTES = 256 << 20
LOGIT_COPIES = 4
"""Logits, their softmax and both gradients, float32, take `LOGIT_BYTES` in all."""

Calls = Sequence[Mapping[str, Any]]
"""For each block the arguments, besides the hidden states, that the model calls it with."""


class Decoder:
    """A model as outside and blocks.

    Attributes:
        model: the whole module tree; blocks that are not in memory have their shapes in it.
        blocks_name: module name of the list of blocks.
        blocks: that list.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        readers: Mapping[str, Reader] | None = None,
        *,
        keeps_blocks: bool = False,
        name: str = "the model",
    ) -> None:
        """Make a decoder; nothing is read yet.

        Args:
            model: the skeleton, on the meta device; or a whole model, and no readers.
            readers: for each stored tensor, by the model's name for it, how to read it.
            keeps_blocks: blocks stay in memory once they were read.
            name: what messages call it.
        """
        self.model = model
        self.name = name
        self.keeps_blocks = keeps_blocks
        self.blocks_name = blocks_name(self.groups)
        self.blocks: nn.ModuleList = model.get_submodule(self.blocks_name)  # type: ignore[assignment]  # known by name
        self._readers = dict(readers or {})
        self._checked: set[str] = set()
        self._has_outside = readers is None
        self._returns_tuple: bool = getattr(architecture(model.config.model_type), "RETURNS_TUPLE", False)

    @classmethod
    def of(cls, model: "PreTrainedModel | Decoder") -> "Decoder":
        """A decoder as it is, or of a model that is whole in memory."""
        return model if isinstance(model, Decoder) else cls(model)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def groups(self) -> list[Group]:
        """The groups that the architecture lists for the config as it is now."""
        return model_groups(self.model)

    @property
    def is_streamed(self) -> bool:
        """Whether blocks come and go, as they do not all fit into memory."""
        return bool(self._readers) and not self.keeps_blocks

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def prefix(self, layer: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.blocks_name}.{layer}."

    def outside_names(self) -> list[str]:
        """Names of the stored tensors that lie outside the blocks; of tied ones the first."""
        first: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not name.startswith(f"{self.blocks_name}."):
                first.setdefault(id(tensor), name)
        return list(first.values())

    @property
    def head_name(self) -> str:
        """Name of the stored weight of the head; where it is tied, that of the embedding."""
        self.load_outside()
        head = self.model.get_output_embeddings()
        assert head is not None, "a model without a head"
        state = self.model.state_dict(keep_vars=True)
        return next(name for name in self.outside_names() if state[name] is head.weight)

    @property
    def embedding_alone(self) -> set[int]:
        """Identity of the weight of the token embedding, where it is not tied to the head; else nothing."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        assert head is not None, "a model without a head"
        return {id(embedding.weight)} - {id(head.weight)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that a checkpoint stores, by name; those of blocks that are not in memory lie on meta."""
        self.load_outside()
        state = self.model.state_dict(keep_vars=True)
        inside = [name for name in state if name.startswith(f"{self.blocks_name}.")]
        return {name: state[name].detach() for name in (*self.outside_names(), *inside)}

    def load_outside(self) -> None:
        """Read what lies outside the blocks, and compute the buffers that no file stores, if that is not done.

        Raises:
            EdgepruneError: if a weight is not finite.
        """
        if self._has_outside:
            return
        state = self.model.state_dict()
        outside = {name for name in state if not name.startswith(f"{self.blocks_name}.")}
        self.model.load_state_dict(
            {name: self.read_tensor(name) for name in outside & self._readers.keys()}, strict=False, assign=True
        )
        self.model.tie_weights()
        for name, module in self.model.named_modules():
            if not name.startswith(f"{self.blocks_name}."):
                self._compute_buffers(module)
        self.model.requires_grad_(False)
        self.model.eval()
        self._has_outside = True

    @contextmanager
    def block(self, layer: int, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """One block, its values in memory while the code inside runs.

        Args:
            layer: which.
            dtype: what its weights must be; None takes them as they are stored. Where they differ, the code inside
                gets a copy, otherwise the block itself, which it may change.

        Raises:
            EdgepruneError: if a weight is not finite.
        """
        block = self.blocks[layer]
        if _is_on_meta(block) and dtype not in (None, *_dtypes(block)) and not self.keeps_blocks:
            fresh = copy.deepcopy(block)
            self._fill(fresh, self._read(layer, dtype))
            yield fresh
            return
        if _is_on_meta(block):
            self._fill(block, self._read(layer))
            drops = not self.keeps_blocks
        else:
            drops = False
        try:
            if dtype is not None and _dtypes(block) != {dtype}:
                yield copy.deepcopy(block).to(dtype)
            else:
                yield block
        finally:
            if drops:
                block.to("meta")

    @contextmanager
    def outside(self, dtype: torch.dtype | None = None, *, is_behind: bool = False) -> Iterator[PreTrainedModel]:
        """The model with what lies outside the blocks in `dtype` (None: as it is) while the code inside runs.

        With `is_behind` an embedding that is not the head as well stays as it is: what lies behind the blocks reads
        nothing of it, and it is as large as the head.
        """
        self.load_outside()
        passed = {id(parameter) for parameter in self.blocks.parameters()}
        if is_behind:
            passed |= self.embedding_alone
        before = [
            (parameter, parameter.data)
            for parameter in self.model.parameters()
            if id(parameter) not in passed and dtype not in (None, parameter.dtype)
        ]
        try:
            for parameter, data in before:
                parameter.data = data.to(dtype)
            yield self.model
        finally:
            for parameter, data in before:
                parameter.data = data

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all blocks in memory while the code inside runs."""
        with ExitStack() as stack:
            stack.enter_context(self.outside())
            for layer in range(self.layers):
                stack.enter_context(self.block(layer))
            yield self.model

    def read_from(self, layer: int, readers: Mapping[str, Reader]) -> None:
        """Let a block that is not in memory be read from elsewhere from now on; names are those inside the block."""
        prefix = self.prefix(layer)
        self._readers = {name: read for name, read in self._readers.items() if not name.startswith(prefix)}
        self._readers |= {prefix + name: read for name, read in readers.items()}

    def finite_tensors(self, layer: int, what: str) -> dict[str, torch.Tensor]:
        """The tensors of a block that is in memory, by their names inside it; `what` is what messages call the model.

        Raises:
            EdgepruneError: if a value is not finite.
        """
        tensors = {name: tensor.detach() for name, tensor in self.blocks[layer].state_dict().items()}
        for name, tensor in tensors.items():
            check_finite(what, self.prefix(layer) + name, tensor)
        return tensors

    def release(self, layer: int) -> None:
        """Give the memory of a block back; it must be readable again, or never be used again."""
        self.blocks[layer].to("meta")

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, Calls]:
        """What enters the first block, `(B, T, D)` float32, and the arguments of each block."""
        recorders = [self._stand_in(block) for block in self.blocks]
        with self.outside(torch.float32) as model, self._blocks_replaced(recorders):
            model.base_model(input_ids=ids, use_cache=False)
        return recorders[0].hidden, [recorder.arguments for recorder in recorders]

    def run(self, layer: int, block: nn.Module, hidden: torch.Tensor, calls: Calls) -> torch.Tensor:
        """What a block makes of hidden states `(B, T, D)`."""
        output = block(hidden, **calls[layer])
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def logits(self, hidden: torch.Tensor, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """Logits `(B, T, V)` of what leaves the last block; `dtype` is that of the weights, None as they are."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        replays = [self._stand_in(block, replay=hidden) for block in self.blocks]
        with self.outside(dtype, is_behind=True) as model, self._blocks_replaced(replays):
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    def _stand_in(self, block: nn.Module, replay: torch.Tensor | None = None) -> "_StandIn":
        return _StandIn(block, replay, returns_tuple=self._returns_tuple)

    def _fill(self, block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give a block on meta its values."""
        block.load_state_dict(tensors, assign=True)
        for module in block.modules():
            self._compute_buffers(module)

    def _compute_buffers(self, module: nn.Module) -> None:
        """Compute the buffers of a module that no file stores (rotary frequencies, causal masks), if they are on meta.

        transformers knows how: it does so as it initialises a module, and passes over tensors that are marked as done.
        """
        missing = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not missing:
            return
        for name, buffer in missing.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # their mark
        with torch.no_grad(), quiet_global_reads():
            self.model._init_weights(module)

    def _read(self, layer: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        return_freed_memory()  # all of the block before is let go of by now, also by the code that used it
        prefix = self.prefix(layer)
        names = self.blocks[layer].state_dict()
        return {name: self.read_tensor(prefix + name).to(dtype) for name in names}

    def read_tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, as it is stored; the model is left as it is.

        Raises:
            EdgepruneError: if a weight is not finite.
        """
        tensor = self._readers[name]()
        if name not in self._checked:
            check_finite(self.name, name, tensor)
            self._checked.add(name)
        return tensor

    @contextmanager
    def _blocks_replaced(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        parent_name, _, attribute = self.blocks_name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        setattr(parent, attribute, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(parent, attribute, self.blocks)


class Pass:
    """A decoder that is run on sequences of one length in one precision, as statistics and searches do.

    Weights are taken as they are stored under bfloat16 products (autocast), and are float32 without. Hidden states
    between blocks, and logits, are float32 either way.

    Attributes:
        dtype: of the matrix products.
        weights_dtype: what the weights must be; None takes them as they are.
        logit_tokens: tokens of one sequence whose logits, with what a loss makes of them, take `LOGIT_BYTES`.
    """

    def __init__(self, decoder: Decoder, ids: torch.Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights_dtype = None if dtype == torch.bfloat16 else torch.float32
        vocabulary = decoder.config.get_text_config().vocab_size
        self.logit_tokens = max(1, LOGIT_BYTES // (LOGIT_COPIES * vocabulary * torch.float32.itemsize))
        self._decoder = decoder
        with decoder.outside(torch.float32):
            one, two = (decoder.embed(ids[:1].expand(sequences, -1))[1] for sequences in (1, 2))
        self._calls: Calls = one
        self._of_sequences = [_of_sequences(*pair) for pair in zip(one, two, strict=True)]

    def run(self, layer: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block makes of hidden states `(B, T, D)`."""
        calls = list(self._calls)
        calls[layer] = {
            name: _repeated(value, len(hidden)) if name in self._of_sequences[layer] else value
            for name, value in calls[layer].items()
        }
        with self.products():
            return self._decoder.run(layer, block, hidden, calls).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(B, T, V)` of what leaves the last block."""
        with self.products():
            return self._decoder.logits(hidden, self.weights_dtype).float()

    @contextmanager
    def products(self) -> Iterator[None]:
        """Inside, matrix products have this precision."""
        if self.dtype != torch.bfloat16:
            yield
            return
        with torch.autocast("cpu", dtype=torch.bfloat16), _FloatNorms():
            yield


class _FloatNorms(TorchFunctionMode):
    """LayerNorm with its weights in the precision of its input: hidden states are float32, and no kernel mixes them."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if function is nn.functional.layer_norm:  # which names its weights on the way to here
            dtype = args[0].dtype
            named |= {name: x.to(dtype) for name, x in named.items() if isinstance(x, torch.Tensor)}
        return function(*args, **named)


def model_groups(model: PreTrainedModel) -> list[Group]:
    """The groups that the model's architecture file lists."""
    return config_groups(model.config)


def check_finite(model_name: str, name: str, tensor: torch.Tensor) -> None:
    """Check that no value of a tensor is NaN or infinite.

    Raises:
        EdgepruneError: naming the tensor.
    """
    # A sum is finite only if every summand is, and costs a fifth of a look at each; where it overflows, look.
    if tensor.detach().sum().isfinite():
        return
    if count := int((~tensor.detach().isfinite()).sum()):
        raise EdgepruneError(f"{model_name}: {name} holds {count} NaN or infinite values; expected finite weights")


def return_freed_memory() -> None:
    """Let the C library give freed memory back to the system, where it is glibc.

    It keeps freed tensors of up to 32 MiB for later ones. As widths differ from block to block, holes remain that no
    later tensor fits into, and a process that holds no more than one block grows with their number.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))


def _is_on_meta(block: nn.Module) -> bool:
    return next(block.parameters()).is_meta


def _dtypes(block: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in block.parameters()}


class _StandIn(nn.Module):
    """Stands in for a block: keeps what it is called with, and hands on the hidden states, or those given to replay."""

    def __init__(self, block: nn.Module, replay: torch.Tensor | None, *, returns_tuple: bool) -> None:
        super().__init__()
        self._modules["block"] = block
        self.replay = replay
        self.returns_tuple = returns_tuple
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        # models read attributes such as `attention_type` off their blocks
        block = cast(Any, self.__dict__["_modules"]["block"])
        return block if name == "block" else getattr(block, name)

    def forward(self, hidden: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor | tuple[torch.Tensor]:
        _, *names = inspect.signature(self.block.forward).parameters
        self.hidden, self.arguments = hidden, dict(zip(names, positional, strict=False)) | named
        states = hidden if self.replay is None else self.replay
        return (states,) if self.returns_tuple else states


def _of_sequences(one: Mapping[str, Any], two: Mapping[str, Any]) -> frozenset[str]:
    """Names of the arguments that have rows for every sequence and do not broadcast: ALiBi's `(B * heads, 1, T)`."""
    return frozenset(
        name
        for name, value in one.items()
        if isinstance(value, torch.Tensor) and value.ndim and 1 != len(value) != len(two[name])
    )


def _repeated(value: torch.Tensor, sequences: int) -> torch.Tensor:
    """Rows of one sequence for so many alike."""
    return value.repeat(sequences, *(1 for _ in value.shape[1:]))
