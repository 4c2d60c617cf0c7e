r"""Our graphs against other people's, in one ONNX Runtime by one loop; and a pruned bundle against llama.cpp.

    python benchmarks/runtime_peers.py --pruned pruned/bundle --builder \
        --mobius-python mobius/bin/python --llama-python llama/bin/python --rounds 9

Graphs of the dense model, by us, by onnxruntime-genai's model builder and by mobius-onnx, all run in the ONNX Runtime
of this environment, fed by one plain loop (`peer_worker.py`), so that what differs is the graph. Ours also run as
`edgeprune pack` writes them, with the weights packed for this machine in the file. llama.cpp runs its own way, through
its C functions. A peer that no option asks for is left out, and the last table says how to get it.

A round is two fresh processes for each model: one loads its files from the disk and gives one token, the other loads
them again, warms up, and is timed. Models take turns, in another order each round; a ratio is the median of the rounds'
ratios, its interval a bootstrap over rounds. What was prepared and every finished round stay in --work, so the same
command goes on where it stopped; give it another --results, or delete that file, to measure anew.

Decoding one token reads every weight once, so the time that two threads take to read as many bytes is the floor under
it. Memory is read in every round, in the same turns; where a processor's cache holds a good part of the model, an array
of the model's own size is read faster than a large one, and the floor is given by both.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import onnxruntime
import peer_graphs
import results
from peer_graphs import Graph
from peer_tables import GENAI, LARGE_BYTES, LLAMA, MOBIUS, PACKED, Model, Round, Size, make_report

from edgeprune.cli.stages import Stages
from edgeprune_runtime.bundle import Bundle, open_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.report import Report

WORKER = Path(__file__).with_name("peer_worker.py")
PRECISIONS = "fp32,int8,int4"
LEVELS = (0, 4)


def main() -> Report:
    """Prepare what is asked for, measure it in turns, and report."""
    args = _arguments()
    stages = Stages(quiet=False)
    _check(args)
    args.work.mkdir(parents=True, exist_ok=True)
    dense = _dense_bundle(args, stages)
    models = ours_of(dense, args.work)
    models += _peers(args, stages, dense)
    if args.pruned is not None:
        models.append(_bundled("pruned int4", open_bundle(args.pruned, "int4")))
        models.append(_packed("pruned int4", open_bundle(args.pruned, "int4"), args.work))
    texts = _texts(args.text, dense)
    digest = _digest(json.dumps(texts).encode())
    kept = results.Results(args.results or args.work / "rounds.jsonl")
    judged: dict[str, Any] = {}
    with stages.counted("what rounding costs") as advance:
        for done, model in enumerate(models, start=1):
            key: dict[str, Any] = {"judged": model.identity, "texts": digest}
            judged[model.name] = _once(kept, key, partial(judge, model, texts, args.threads))
            advance(done, len(models))
    settings = {name: getattr(args, name) for name in ("threads", "prompt_tokens", "generate_tokens")}
    rounds: list[Any] = []
    with stages.counted("rounds in turns") as advance:
        for number in range(args.rounds):
            key = {"models": {model.name: model.identity for model in models}, **settings, "round": number}
            rounds.append(_once(kept, key, partial(measure_round, models, number, settings)))
            advance(number + 1, args.rounds)
    return make_report(models, rounds, judged, _sizes(dense, args.pruned), _missing(args), settings)


def _arguments() -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    parser.add_argument("--pruned", type=Path, help="bundle of the pruned model, with an int4 variant")
    parser.add_argument("--dense", type=Path, help="bundle of the dense model (default: made in --work)")
    parser.add_argument("--checkpoint", type=Path, help="the dense model in HF form (default: made from --model)")
    parser.add_argument("--model", default=common.MODEL, help="the dense model (default: %(default)s)")
    parser.add_argument("--precisions", default=PRECISIONS, help="of the bundle made here (default: %(default)s)")
    parser.add_argument("--builder", action="store_true", help="measure the graphs of onnxruntime-genai's builder")
    parser.add_argument("--mobius-python", type=Path, help="Python of an environment with mobius-onnx")
    parser.add_argument("--llama-python", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the dense model for llama.cpp (default: the file behind --model)")
    parser.add_argument("--text", type=Path, help="text to judge rounding by (default: a few built-in paragraphs)")
    parser.add_argument("--work", type=Path, default=common.OUT / "runtime-peers", help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="file of finished rounds (default: rounds.jsonl in --work)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--generate-tokens", type=int, default=64, help="at least 2 (default: %(default)s)")
    return parser.parse_args()


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured before anything is prepared."""
    for name, least in (("rounds", 1), ("threads", 1), ("prompt_tokens", 1), ("generate_tokens", 2)):
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise EdgepruneError(f"--{option} is {getattr(args, name)}; at least {least} was expected")
    if args.pruned is not None:
        open_bundle(args.pruned, "int4")
    if args.builder:
        peer_graphs.check_genai()
    if args.mobius_python is not None:
        peer_graphs.check_python("--mobius-python", args.mobius_python, "mobius", "pip install mobius-onnx==0.1.0")
    if args.llama_python is not None:
        install = "pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36"
        peer_graphs.check_python("--llama-python", args.llama_python, "llama_cpp", install)
        if _gguf(args) is None:
            raise EdgepruneError(f"--model {args.model} is no GGUF file, which llama.cpp needs; name one with --gguf")


def _gguf(args: argparse.Namespace) -> Path | None:
    """The GGUF file of the dense model, if there is one."""
    from edgeprune.sources import open_source

    if args.gguf is not None:
        if not args.gguf.is_file():
            raise EdgepruneError(f"--gguf {args.gguf} is no file; give the dense model as a GGUF file")
        return Path(args.gguf)
    source = open_source(args.model)
    return source.path if source.kind == "gguf" else None


def _checkpoint(args: argparse.Namespace, stages: Stages) -> Path:
    """The dense model as a folder in Hugging Face form, made once."""
    if args.checkpoint is not None:
        return Path(args.checkpoint)
    folder: Path = args.work / "checkpoint"
    if not folder.is_dir():
        with stages.stage("dense checkpoint"):
            common.save_dense(args.model, folder)
    return folder


def _dense_bundle(args: argparse.Namespace, stages: Stages) -> Bundle:
    """The dense model's bundle, made once."""
    folder: Path = args.dense or args.work / "dense"
    if not folder.is_dir() and args.dense is None:
        from edgeprune_export.exporting import export
        from edgeprune_export.quantize import parse_precisions

        precisions = parse_precisions(args.precisions)
        checkpoint = _checkpoint(args, stages)
        with stages.stage("dense bundle") as step:
            export(checkpoint, folder, name=f"{args.model} (dense)", precisions=precisions, progress=step)
    return open_bundle(folder, "fp32")


def ours_of(dense: Bundle, work: Path) -> list[Model]:
    """A model for each variant of the dense bundle, packed as well, and for each other `accuracy_level`."""
    models = []
    for name in dense.manifest.variants:
        bundle = open_bundle(dense.folder, name)
        model = _bundled(f"ours {name}", bundle)
        models.append(model)
        models.append(_packed(model.name, bundle, work))
        for level in LEVELS if model.accuracy_level is not None else ():
            if level != model.accuracy_level:
                graph = peer_graphs.at_level(peer_graphs.read_graph(bundle.graph_path), level, work / f"{name}-{level}")
                models.append(_of_graph(f"ours {name}, level {level}", graph, bundle))
    return models


def _peers(args: argparse.Namespace, stages: Stages, dense: Bundle) -> list[Model]:
    """The peers that were asked for, of the same dense model."""
    models = []
    if args.builder:
        for precision in ("fp32", "int4"):
            with stages.stage(f"{GENAI}, {precision}"):
                graph = peer_graphs.build_genai(_checkpoint(args, stages), precision, args.work / f"genai-{precision}")
            models.append(_of_graph(f"{GENAI} {precision}", graph, dense))
    if args.mobius_python is not None:
        with stages.stage(f"{MOBIUS}, fp32"):
            graph = peer_graphs.build_mobius(args.mobius_python, _checkpoint(args, stages), args.work / "mobius-fp32")
        models.append(_of_graph(f"{MOBIUS} fp32", graph, dense))
        if (gguf := _gguf(args)) is not None:
            with stages.stage(f"{MOBIUS}, blocks of the GGUF file"):
                graph = peer_graphs.build_mobius(args.mobius_python, gguf, args.work / "mobius-int4")
            models.append(_of_graph(f"{MOBIUS} int4", graph, dense))
    if args.llama_python is not None and (gguf := _gguf(args)) is not None:
        read = peer_graphs.gguf_bytes(gguf)
        shape = dense.manifest.vocab_size, dense.manifest.layers[0].head_dim
        models.append(Model(f"{LLAMA} {gguf.stem}", "llama", args.llama_python, (gguf,), read, *shape))
    return models


def _bundled(name: str, bundle: Bundle) -> Model:
    return _of_graph(name, peer_graphs.read_graph(bundle.graph_path), bundle)


def _packed(name: str, bundle: Bundle, work: Path) -> Model:
    """A bundle's graph with its weights packed here; what loading it takes is held against the bundle's own files."""
    folder = work / f"{name.replace(' ', '-')}-packed-{onnxruntime.__version__}"
    model = _of_graph(f"{name}{PACKED}", peer_graphs.packed(bundle, folder), bundle)
    return replace(model, unpacked_bytes=bundle.size_bytes)


def _of_graph(name: str, graph: Graph, bundle: Bundle) -> Model:
    """A graph of the same shape as a bundle's."""
    manifest, python = bundle.manifest, Path(sys.executable)
    sizes = graph.token_bytes, manifest.vocab_size, manifest.layers[0].head_dim
    in_place = graph.writes_in_place
    return Model(name, "onnx", python, graph.files, *sizes, graph.accuracy_level, writes_in_place=in_place)


def _texts(path: Path | None, dense: Bundle) -> list[list[int]]:
    """Windows of token ids, as the export's own gate takes them."""
    from edgeprune_export.fidelity import fidelity_texts
    from edgeprune_export.sample_text import DEFAULT_TEXT
    from edgeprune_runtime.text import read_text
    from edgeprune_runtime.tokenizer import Tokenizer

    text = DEFAULT_TEXT if path is None else read_text(path).text
    ids = [int(token) for token in Tokenizer.load(dense).encode(text)]
    return fidelity_texts([ids], dense.manifest.context_tokens)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _once(kept: results.Results, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """What the worker as it is measured under a key, or measures now."""
    key = {**key, "worker": _digest(WORKER.read_bytes())}
    if (found := kept.find(key)) is not None:
        return found["result"]
    result = measure()
    kept.add(key, {"result": result, "code": results.code_hash()})
    return result


def judge(model: Model, texts: Sequence[Sequence[int]], threads: int) -> dict[str, Any]:
    """Nats of a model over the texts, and its likeliest tokens."""
    request = {"threads": threads, "texts": texts, "context_tokens": max(map(len, texts))}
    rows = ask(model, request)["texts"]
    return {
        "nats": sum(row["nats"] for row in rows),
        "likeliest": [token for row in rows for token in row["likeliest"]],
    }


def measure_round(models: Sequence[Model], number: int, settings: Mapping[str, int]) -> Round:
    """One round: every model in two fresh processes, and memory, in this round's order."""
    found: dict[str, dict[str, Any]] = {}
    turn = [*models, None]
    turn = turn[number % len(turn) :] + turn[: number % len(turn)]
    for model in turn if number % 2 == 0 else reversed(turn):
        if model is None:
            sizes = sorted({LARGE_BYTES, *(each.token_bytes for each in models)})
            read = {"engine": "read", "threads": settings["threads"], "sizes": sizes}
            found["read"] = _in_fresh_process(Path(sys.executable), read, "memory")["pass_ms"]
            continue
        request = {**settings, "context_tokens": settings["prompt_tokens"] + settings["generate_tokens"]}
        cold = ask(model, {**request, "cold": True, "generate_tokens": 1})
        found[model.name] = {"cold": cold, **ask(model, request)}
    return found


def ask(model: Model, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process found out about a model."""
    whole = {
        "engine": model.engine,
        "file": str(model.files[0]),
        "files": list(map(str, model.files)),
        "vocab_size": model.vocab_size,
        "head_dim": model.head_dim,
        "writes_in_place": model.writes_in_place,
        "cold": False,
        "texts": [],
        **request,
    }
    return _in_fresh_process(model.python, whole, model.name)


def _in_fresh_process(python: Path, request: Mapping[str, Any], name: str) -> dict[str, Any]:
    # Each engine is told its threads; what OpenMP is told by the environment would hold back some of them.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    environment["OPENBLAS_NUM_THREADS"] = "1"
    command = [str(python), str(WORKER)]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EdgepruneError(f"{name} could not be measured (exit code {done.returncode}): {reason}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _missing(args: argparse.Namespace) -> list[str]:
    given = {
        GENAI: args.builder,
        MOBIUS: args.mobius_python is not None,
        LLAMA: args.llama_python is not None,
        "pruned": args.pruned is not None,
    }
    return [name for name, is_given in given.items() if not is_given]


def _sizes(dense: Bundle, pruned: Path | None) -> list[Size]:
    sizes = [size_of("ours", open_bundle(dense.folder, name), name) for name in dense.manifest.variants]
    if pruned is not None:
        sizes.append(size_of("pruned", open_bundle(pruned, "int4"), "int4"))
    return sizes


def size_of(whose: str, bundle: Bundle, name: str) -> Size:
    """The size of a bundle's variant; blocks and tables (embedding, head) have bits of their own."""
    from edgeprune_export.quantize import PRECISIONS

    graph = peer_graphs.read_graph(bundle.graph_path)
    precision = graph.stored_as(PRECISIONS[name])
    block_bits, table_bits = precision.bits_per_weight, precision.tables.bits_per_weight
    counts = bundle.manifest.parameters
    expected = (counts.blocks * block_bits + (counts.all - counts.blocks) * table_bits) / 8
    return Size(f"{whose} {name}", counts.all, block_bits, table_bits, expected, graph.size_bytes)


if __name__ == "__main__":
    common.run(main)
