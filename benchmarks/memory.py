"""Whether a model far larger than memory can be pruned and exported: peak memory and time by its decoder blocks.

    python benchmarks/memory.py --folder /big/disk                           # 2, 4 and 8 blocks of a Llama-7B
    python benchmarks/memory.py --folder /big/disk --job export --limit-gb 2.5 --max-memory 2.4GB
    python benchmarks/memory.py --folder /big/disk --blocks 32               # the whole of it
    python benchmarks/memory.py --folder /big/disk -- --method taylor-fine   # everything behind -- goes to compress

Everything is made on the spot: a checkpoint of the shape of Llama-7B (hidden 4096, 32 heads, MLP 11008, vocabulary
32,000) with random bfloat16 weights, written shard by shard, a byte-level tokenizer, and random words to calibrate on.
Random weights say nothing about accuracy, but time and memory do not depend on their values. Each number of blocks is
one fresh `edgeprune compress FOLDER --checkpoint-only --max-memory SIZE --allocation uniform:mixed`. Blocks that fit
into --max-memory beside the work are kept there, which is faster but grows with them: to see them streamed, give less
than the smallest count would need.

`--job export` is `edgeprune export FOLDER --precision int4 --max-memory SIZE` of the checkpoint as it is. Random
weights lose nearly everything when they are rounded, so the gate on that is set aside; the one on what the graph
computes is not.

Pruning in streams of blocks takes a fixed time and a time per block, so a line through a few small counts foretells the
32 blocks of the whole model; and its memory must not grow with the blocks at all.

Peak RSS is the kernel's own count at the process's end (wait4, what `/usr/bin/time -v` prints as maximum resident set),
which no sampling can miss. It holds pages of weight files that are mapped into memory, which the kernel takes back
whenever it likes; how much was not such pages is given beside it, sampled from /proc. The kernel hands a child the
count of the process that started it, so this script stays small: it leaves all weights to processes of their own.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import common

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.output import check_space
from edgeprune_runtime.report import Report, Table, Verdict, format_bytes

if TYPE_CHECKING:
    import torch

PROC = Path("/proc")
SHARDS, CALIBRATION = "shards", "calibration.txt"
OUTSIDE = "outside.safetensors"
"""Shard of the embedding, the last norm and the vocabulary projection."""
SAME = 0.05
"""Peaks that differ by less are one and the same: the allocator and the kernel are not exact."""
ALLOCATION = ("--allocation", "uniform:mixed")
"""Every block gives the same share, and so takes the same time; others leave some alone, or all of a small count."""
INT4 = ("--precision", "int4", "--max-perplexity-ratio", "1e9", "--min-agreement", "0")
SAMPLE_S = 0.1
HELD_OUT_SEQUENCES = 32
"""Room for the sequences that `compress` draws besides those it calibrates on."""
BF16_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    heads: int
    kv_heads: int
    channels: int
    vocabulary: int
    context: int = 2048

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of a decoder block, by its name within the block."""
        keys = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "mlp.gate_proj.weight": (self.channels, self.hidden),
            "mlp.up_proj.weight": (self.channels, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.channels),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    @property
    def outside(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor outside the blocks."""
        table = (self.vocabulary, self.hidden)
        return {"model.embed_tokens.weight": table, "model.norm.weight": (self.hidden,), "lm_head.weight": table}

    def stored_bytes(self, blocks: int) -> int:
        """Size of a checkpoint in bfloat16."""

        def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
            return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())

        return BF16_BYTES * (parameters(self.outside) + blocks * parameters(self.block))


@dataclass(frozen=True)
class Run:
    """One compression, as it was measured."""

    blocks: int
    checkpoint_bytes: int
    wall_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def main() -> Report:
    """Make the checkpoints, compress or export each, and draw the line."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=common.OUT / "memory", help="where there is room for it")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8], help="default: 2 4 8")
    parser.add_argument("--whole", type=int, default=32, help="blocks of the whole model (default: %(default)s)")
    parser.add_argument("--job", choices=("compress", "export"), default="compress", help="default: %(default)s")
    parser.add_argument("--ratio", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--channels", type=int, default=11008, help="of the MLP (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="default: %(default)s")
    parser.add_argument("--calibration-sequences", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--calibration-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--limit-gb", type=float, default=6.0, help="peak RSS to stay under (default: %(default)s)")
    parser.add_argument("--max-memory", default="6GB", help="for `edgeprune` (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, and use those that are there")
    parser.add_argument("options", nargs="*", help="options of `edgeprune compress` or `export`, behind --")
    args = parser.parse_args()
    shape = Shape(args.hidden, args.heads, args.kv_heads or args.heads, args.channels, args.vocabulary)
    _check(shape, args.blocks)
    most = max(args.blocks)
    check_space(args.folder / SHARDS, round((2 - args.ratio) * shape.stored_bytes(most)))
    folders = [args.folder / f"{blocks}-blocks" for blocks in args.blocks]
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            apart.submit(make_checkpoints, shape, args.folder, args.blocks, args.whole).result()
        text = args.folder / CALIBRATION
        write_words(text, (args.calibration_sequences + HELD_OUT_SEQUENCES) * args.calibration_tokens)
        calibration = [
            *("--calibration", str(text), "--calibration-sequences", str(args.calibration_sequences)),
            *("--calibration-tokens", str(args.calibration_tokens)),
        ]
        runs = []
        for blocks, folder in zip(args.blocks, folders, strict=True):
            output = folder.with_name(f"{folder.name}-{args.job}")
            job = [args.job, str(folder), "--max-memory", args.max_memory]
            if args.job == "compress":
                job += ["--ratio", str(args.ratio), "--checkpoint-only", *ALLOCATION, *calibration, *args.options]
            else:
                job += [*INT4, *args.options]
            command = [sys.executable, "-m", "edgeprune", *job, "-o", str(output), "--force"]
            print(f"{blocks} blocks: {' '.join(command[1:])}", file=sys.stderr, flush=True)
            wall_s, peak, anonymous = run(command)
            runs.append(Run(blocks, shape.stored_bytes(blocks), wall_s, peak, anonymous))
            shutil.rmtree(output)
    finally:
        if not args.keep:
            for folder in (args.folder / SHARDS, *folders):
                shutil.rmtree(folder, ignore_errors=True)
            (args.folder / CALIBRATION).unlink(missing_ok=True)
    done = f"Pruning by {args.ratio:.0%}" if args.job == "compress" else "Exporting to int4"
    title = f"{done} a Llama of {shape.hidden}/{shape.channels} with random weights"
    return make_report(title, runs, args.whole, args.limit_gb, asdict(shape))


def _check(shape: Shape, counts: Sequence[int]) -> None:
    if not PROC.is_dir():
        raise EdgepruneError("this system has no /proc to read memory from; run this benchmark on Linux")
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise EdgepruneError(
            f"--blocks are {', '.join(map(str, counts))}; different counts of at least 1 were expected"
        )
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        raise EdgepruneError(
            f"hidden {shape.hidden}, {shape.heads} heads, {shape.kv_heads} KV heads: "
            "expected each to divide the one before"
        )


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def make_checkpoints(shape: Shape, folder: Path, counts: Sequence[int], whole: int) -> None:
    """A checkpoint folder for each count of blocks; they share their shards by hard links.

    One block at a time is in memory, and shards that are there are not made again.
    """
    import torch

    shards = folder / SHARDS
    shards.mkdir(parents=True, exist_ok=True)
    names = [OUTSIDE, *(_shard(block) for block in range(max(counts)))]
    for seed, name in enumerate(names):
        tensors = shape.outside if name == OUTSIDE else _block_tensors(shape, seed - 1)
        if not (shards / name).exists():
            _write_shard(shards / name, tensors, whole, torch.Generator().manual_seed(seed))
    for blocks in counts:
        _write_folder(shape, folder / f"{blocks}-blocks", shards, blocks)


def _shard(block: int) -> str:
    return f"block-{block:02}.safetensors"


def _block_tensors(shape: Shape, block: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{block}.{name}": size for name, size in shape.block.items()}


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], whole: int, generator: "torch.Generator") -> None:
    """Random tensors, scaled so that a Linear keeps the size of its input and the residual stream grows slowly."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, size in shapes.items():
        if len(size) == 1:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        writes_residual = "o_proj" in name or "down_proj" in name
        scale = size[1] ** -0.5 * ((2 * whole) ** -0.5 if writes_residual else 1.0)
        tensors[name] = torch.empty(size, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.rename(path)


def _write_folder(shape: Shape, folder: Path, shards: Path, blocks: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.channels,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    # Every byte is a token: no merges to learn.
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    names = dict.fromkeys(shape.outside, OUTSIDE)
    for block in range(blocks):
        names |= dict.fromkeys(_block_tensors(shape, block), _shard(block))
    index = {"metadata": {"total_size": shape.stored_bytes(blocks)}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    for name in sorted(set(names.values())):
        os.link(shards / name, folder / name)


def write_words(path: Path, tokens: int) -> None:
    """A text of random words, somewhat longer than `tokens` bytes."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    size, words = 0, []
    while size < 1.25 * tokens:
        words.append("".join(chance.choices(letters, k=chance.randint(2, 9))))
        size += len(words[-1]) + 1
    path.write_text(" ".join(words), "utf-8")


# --- measuring --------------------------------------------------------------------------------------------------------


def run(command: Sequence[str]) -> tuple[float, int, int]:
    """Run a command: wall seconds, its peak RSS by the kernel's count, and the most anonymous memory that was sampled.

    Raises:
        EdgepruneError: if the command failed; it has said why on standard error.
    """
    anonymous = 0
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous_bytes(process.pid))
            time.sleep(SAMPLE_S)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began
    if process.returncode != 0:
        raise EdgepruneError(f"the job ended with exit code {process.returncode}; see its message above")
    return wall_s, usage.ru_maxrss << 10, anonymous  # Linux counts in KiB


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:  # the process has just ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def make_report(title: str, runs: Sequence[Run], whole: int, limit_gb: float, shape: dict[str, int]) -> Report:
    """The runs, the line through their times, and what the whole model would take."""
    columns = ("blocks", "checkpoint GB", "wall s", "s per block", "peak RSS GB", "of it anonymous GB")
    rows = tuple(
        (
            run.blocks,
            run.checkpoint_bytes / 1e9,
            run.wall_s,
            run.wall_s / run.blocks,
            run.peak_rss_bytes / 1e9,
            run.peak_anonymous_bytes / 1e9,
        )
        for run in runs
    )
    peaks = [run.peak_rss_bytes for run in runs]
    verdicts = [Verdict(f"peak RSS is {max(peaks) / 1e9:.2f} GB, limit {limit_gb:g} GB", max(peaks) < limit_gb * 1e9)]
    data: dict[str, object] = {"shape": shape, "runs": [asdict(run) for run in runs]}
    notes = [f"One block takes {format_bytes(block_bytes(runs))} on disk."] if len(runs) > 1 else []
    if len(runs) > 1:
        blocks = [run.blocks for run in runs]
        growth = statistics.linear_regression(blocks, peaks).slope
        few, many = (peaks[blocks.index(pick(blocks))] for pick in (min, max))
        verdicts.append(
            Verdict(
                f"peak RSS of {max(blocks)} blocks is {many / few:.3f} times that of {min(blocks)} "
                f"({growth / 1e6:+.1f} MB per block)",
                many <= (1 + SAME) * few,
            )
        )
        seconds = [run.wall_s for run in runs]
        line = statistics.linear_regression(blocks, seconds)
        estimate_s = line.intercept + whole * line.slope
        off = max(
            abs(line.intercept + line.slope * count - wall_s) / wall_s
            for count, wall_s in zip(blocks, seconds, strict=True)
        )
        verdicts.append(
            Verdict(
                f"time is {line.intercept:.1f} s and {line.slope:.1f} s per block"
                + (f", within {off:.0%} of every run" if len(runs) > 2 else "")
                + f"; {whole} blocks would take {estimate_s / 60:.1f} minutes"
            )
        )
        data |= {
            "fixed_s": line.intercept,
            "block_s": line.slope,
            "whole_s": estimate_s,
            "growth_bytes": growth,
            "largest_miss": off,
        }
    table = Table("Time and memory by blocks", columns, rows, (), tuple(notes))
    return Report(title, this_machine(), (table,), tuple(verdicts), data)


def block_bytes(runs: Sequence[Run]) -> int:
    """Size of one block on disk."""
    first, *_, last = sorted(runs, key=lambda run: run.blocks)
    return (last.checkpoint_bytes - first.checkpoint_bytes) // (last.blocks - first.blocks)


if __name__ == "__main__":
    common.run(main)
