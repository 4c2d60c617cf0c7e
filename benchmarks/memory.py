"""Whether a model far larger than memory can be pruned and exported: peak memory and time by its decoder blocks.

    python benchmarks/memory.py --folder /big/disk                           # 2, 4 and 8 blocks of a Llama-7B
    python benchmarks/memory.py --folder /big/disk --job export --limit-gb 2.5 --max-memory 2.4GB
    python benchmarks/memory.py --folder /big/disk --blocks 32               # the whole of it
    python benchmarks/memory.py --folder /big/disk -- --preset fast          # everything behind -- goes to compress

Everything is made on the spot: a checkpoint of the shape of Llama-7B (hidden 4096, 32 heads, MLP 11008, vocabulary
32,000) with random bfloat16 weights, written shard by shard, a byte-level tokenizer, and random words to calibrate on.
Random weights say nothing about accuracy, and memory does not depend on their values. Each number of blocks is one
fresh `edgeprune compress FOLDER --checkpoint-only --max-memory SIZE`, all else as a user gets it who says nothing more.
Blocks that fit into --max-memory beside the work are kept there, which is faster but grows with them: to see them
streamed, give less than the smallest count would need. The table says of each run which it was, and what `edgeprune`
reckoned with before it read a weight; the peak has to stay below.

`--job export` is `edgeprune export FOLDER --precision int4 --max-memory SIZE` of the checkpoint as it is. Random
weights lose nearly everything when they are rounded, so the gate on that is set aside; the one on what the graph
computes is not.

Pruning in streams of blocks takes a fixed time and a time per block, so a line through a few small counts foretells the
32 blocks of the whole model; and its memory must not grow with the blocks at all. The allocation `judged` tries up to
two rules more from eight blocks on, as of fewer none is protected (the notes name the rules that were tried), and
blocks before the first cut are not reconstructed: with it the line is a rough one.

What a finished run took stays in --folder until the table is there: after an interrupt the same command goes on with
the next run. One that was interrupted itself is measured again from its beginning.

Peak RSS is the kernel's own count at the process's end (wait4, what `/usr/bin/time -v` prints as maximum resident set),
which no sampling can miss. It holds pages of weight files that are mapped into memory, which the kernel takes back
whenever it likes; how much was not such pages is given beside it, sampled from /proc. The kernel hands a child the
count of the process that started it, so this script stays small: it leaves all weights to processes of their own.
"""

import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from results import Results, code_hash

from edgeprune.presets import PRESETS
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
INT4 = ("--precision", "int4", "--max-perplexity-ratio", "1e9", "--min-agreement", "0")
SAMPLE_S = 0.1
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
class Usage:
    """What a process took."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


@dataclass(frozen=True)
class Run:
    """One compression or export, as it was measured.

    Attributes:
        blocks: number of decoder blocks.
        checkpoint_bytes: size of what it read.
        usage: what it took.
        footprint: what `compress` reckoned with (`edgeprune.memory.Footprint`); None of an export.
        plan: how `compress` pruned; None of an export.
    """

    blocks: int
    checkpoint_bytes: int
    usage: Usage
    footprint: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None

    @property
    def estimate_bytes(self) -> int | None:
        """The peak that was reckoned with."""
        return None if self.footprint is None else int(self.footprint["peak_bytes"])

    @property
    def keeps_blocks(self) -> bool:
        """Whether all blocks stayed in memory, so that it has to grow with them."""
        return self.footprint is not None and self.footprint["keeps_blocks"]


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
    parser.add_argument("--calibration-sequences", type=int, help="default: the preset's")
    parser.add_argument("--calibration-tokens", type=int, help="default: the preset's")
    parser.add_argument("--limit-gb", type=float, default=6.0, help="peak RSS to stay under (default: %(default)s)")
    parser.add_argument("--max-memory", default="6GB", help="for `edgeprune` (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, and use those that are there")
    parser.add_argument("options", nargs="*", help="options of `edgeprune compress` or `export`, behind --")
    args = parser.parse_args()
    shape = Shape(args.hidden, args.heads, args.kv_heads or args.heads, args.channels, args.vocabulary)
    _check(shape, args.blocks)
    most = max(args.blocks)
    check_space(args.folder / SHARDS, round((2 - args.ratio) * shape.stored_bytes(most)))
    keys = {blocks: _key(args, shape, blocks) for blocks in args.blocks}
    results = Results(args.folder / _runs_name(keys), code_hash())
    try:
        if left := [blocks for blocks, key in keys.items() if results.find(key) is None]:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
                apart.submit(make_checkpoints, shape, args.folder, left, args.whole).result()
            write_words(args.folder / CALIBRATION, _most_calibration_tokens(args))
        for blocks in left:
            results.add(keys[blocks], {"result": asdict(measure(args, shape, blocks)), "code": code_hash()})
    finally:
        if not args.keep:
            for name in (SHARDS, *map(_checkpoint, args.blocks)):
                shutil.rmtree(args.folder / name, ignore_errors=True)
            (args.folder / CALIBRATION).unlink(missing_ok=True)
    runs = []
    for key in keys.values():
        record = results.find(key)
        assert record is not None, "all are measured by now"
        runs.append(Run(**record["result"] | {"usage": Usage(**record["result"]["usage"])}))
    results.path.unlink()
    done = f"Pruning by {args.ratio:.0%}" if args.job == "compress" else "Exporting to int4"
    how = " ".join(args.options) or "default options"
    title = f"{done} a Llama of {shape.hidden}/{shape.channels} with random weights, {how}"
    return make_report(title, runs, args.whole, args.limit_gb, asdict(shape))


def _key(args: Namespace, shape: Shape, blocks: int) -> dict[str, Any]:
    """All that determines what a run takes, but for the code."""
    return {
        "shape": asdict(shape),
        "blocks": blocks,
        "whole": args.whole,
        "job": _job(args),
        "machine": this_machine().to_dict(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "torch": version("torch"),
    }


def _runs_name(keys: Mapping[int, Mapping[str, Any]]) -> str:
    """File of these runs alone, as it goes when all of them are done."""
    return f"runs-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]}.jsonl"


def _job(args: Namespace) -> list[str]:
    """The command's arguments but for those that name files."""
    if args.job == "export":
        return ["export", "--max-memory", args.max_memory, *INT4, *args.options]
    job = ["compress", "--max-memory", args.max_memory, "--ratio", str(args.ratio), "--checkpoint-only", "--json"]
    for name in ("calibration_sequences", "calibration_tokens"):
        if (count := getattr(args, name)) is not None:
            job += [f"--{name.replace('_', '-')}", str(count)]
    return [*job, *args.options]


def _most_calibration_tokens(args: Namespace) -> int:
    """As many as the most careful preset reads, or as were asked for."""
    sequences = args.calibration_sequences or max(preset.calibration_sequences for preset in PRESETS.values())
    return sequences * (args.calibration_tokens or max(preset.calibration_tokens for preset in PRESETS.values()))


def _checkpoint(blocks: int) -> str:
    return f"{blocks}-blocks"


def measure(args: Namespace, shape: Shape, blocks: int) -> Run:
    """Run the job on the checkpoint of so many blocks."""
    folder = args.folder / _checkpoint(blocks)
    # the job's journal lies beside its output: what an interrupted run has left must not be continued, but measured
    work = folder.with_name(f"{folder.name}-{args.job}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    name, *arguments = _job(args)
    calibration = ["--calibration", str(args.folder / CALIBRATION)] if name == "compress" else []
    command = [sys.executable, "-m", "edgeprune", name, str(folder), *arguments, *calibration]
    print(f"{blocks} blocks: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    try:
        usage, said = run([*command, "-o", str(work / "output")])
    finally:
        shutil.rmtree(work)
    found = json.loads(said.splitlines()[-1])["data"] if name == "compress" else {}
    return Run(blocks, shape.stored_bytes(blocks), usage, found.get("footprint"), found.get("plan"))


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


def run(command: Sequence[str]) -> tuple[Usage, str]:
    """Run a command: what it took (all but anonymous memory by the kernel's count), and its standard output.

    Raises:
        EdgepruneError: if the command failed; it has said why on standard error.
    """
    anonymous = 0
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, subprocess.Popen(command, stdout=said) as process:
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
        said.seek(0)
        peak_bytes = usage.ru_maxrss << 10  # Linux counts in KiB
        return Usage(wall_s, usage.ru_utime + usage.ru_stime, peak_bytes, anonymous), said.read()


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except OSError:  # the process has just ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def make_report(title: str, runs: Sequence[Run], whole: int, limit_gb: float, shape: dict[str, int]) -> Report:
    """The runs, the line through their times, and what the whole model would take."""
    columns = (
        *("blocks", "checkpoint GB", "wall s", "s per block", "CPU s per block"),
        *("peak RSS GB", "of it anonymous GB", "reckoned with GB", "all blocks in memory"),
    )
    rows = tuple(
        (
            run.blocks,
            run.checkpoint_bytes / 1e9,
            run.usage.wall_s,
            run.usage.wall_s / run.blocks,
            run.usage.cpu_s / run.blocks,
            run.usage.peak_rss_bytes / 1e9,
            run.usage.peak_anonymous_bytes / 1e9,
            run.estimate_bytes and run.estimate_bytes / 1e9,
            run.footprint and ("yes" if run.keeps_blocks else "no"),
        )
        for run in runs
    )
    largest = max(run.usage.peak_rss_bytes for run in runs)
    verdicts = [Verdict(f"peak RSS is {largest / 1e9:.2f} GB, limit {limit_gb:g} GB", largest < limit_gb * 1e9)]
    shares = [run.usage.peak_rss_bytes / run.estimate_bytes for run in runs if run.estimate_bytes]
    if shares:
        verdicts.append(Verdict(f"peak RSS is at most {max(shares):.0%} of what was reckoned with", max(shares) <= 1))
    data: dict[str, object] = {"shape": shape, "runs": [asdict(run) for run in runs]}
    streamed = [run for run in runs if not run.keeps_blocks]
    if len(streamed) > 1:
        few, many = (pick(streamed, key=lambda run: run.blocks) for pick in (min, max))
        times = many.usage.peak_rss_bytes / few.usage.peak_rss_bytes
        growth = _line(streamed, [run.usage.peak_rss_bytes for run in streamed]).slope
        verdicts.append(
            Verdict(
                f"peak RSS of {many.blocks} blocks is {times:.3f} times that of {few.blocks} "
                f"({growth / 1e6:+.1f} MB per block)",
                times <= 1 + SAME,
            )
        )
        data["growth_bytes"] = growth
    if len(runs) > 1:
        seconds = [run.usage.wall_s for run in runs]
        line, cpu = _line(runs, seconds), _line(runs, [run.usage.cpu_s for run in runs])
        estimate_s = line.intercept + whole * line.slope
        off = max(
            abs(line.intercept + line.slope * run.blocks - wall_s) / wall_s
            for run, wall_s in zip(runs, seconds, strict=True)
        )
        verdicts.append(
            Verdict(
                f"time is {line.intercept:.1f} s and {line.slope:.1f} s per block"
                + (f", within {off:.0%} of every run" if len(runs) > 2 else "")
                + f"; {whole} blocks would take {estimate_s / 60:.1f} minutes "
                f"(CPU: {cpu.intercept:.1f} s and {cpu.slope:.1f} s per block)"
            )
        )
        data |= {"fixed_s": line.intercept, "block_s": line.slope, "whole_s": estimate_s, "largest_miss": off}
    table = Table("Time and memory by blocks", columns, rows, (), tuple(_notes(runs)))
    return Report(title, this_machine(), (table,), tuple(verdicts), data)


def _line(runs: Sequence[Run], values: Sequence[float]) -> statistics.LinearRegression:
    return statistics.linear_regression([run.blocks for run in runs], values)


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """How big a block is, how the job pruned, and what it said of each count of blocks."""
    if len(runs) > 1:
        yield f"One block takes {format_bytes(block_bytes(runs))} on disk."
    pruned = [(run.blocks, run.plan) for run in runs if run.plan is not None]
    yield from dict.fromkeys(
        f"importance {plan['method']}, allocation {plan['allocation']}, heads {plan['heads']}, refit {plan['refit']}, "
        f"statistics in {plan['dtype']}, {plan['calibration']['sequences']} x {plan['calibration']['length_tokens']} "
        "tokens"
        for _, plan in pruned
    )
    yield from (f"{blocks} blocks: {note}" for blocks, plan in pruned for note in plan["notes"])


def block_bytes(runs: Sequence[Run]) -> int:
    """Size of one block on disk."""
    first, *_, last = sorted(runs, key=lambda run: run.blocks)
    return (last.checkpoint_bytes - first.checkpoint_bytes) // (last.blocks - first.blocks)


if __name__ == "__main__":
    common.run(main)
