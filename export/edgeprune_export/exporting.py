"""From a checkpoint folder to a bundle: graph, gate, golden data, configs, manifest; all of it or nothing."""

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedConfig

import edgeprune_runtime
from edgeprune.checkpoint import load_pruned, open_decoder
from edgeprune.configs import LAYOUT_KEY, UNSAFE_CONFIG_KEYS, architecture, load_config, stock_config
from edgeprune.journal import Journal
from edgeprune.licences import check_inside, licence_texts
from edgeprune.plan import PLAN_FILE, PrunePlan
from edgeprune.shrink import LinearShape, linear_of
from edgeprune.weights import read_json
from edgeprune_export import decoder, traced
from edgeprune_export.external_data import ExternalData
from edgeprune_export.fidelity import FidelityError
from edgeprune_export.genai import genai_config
from edgeprune_export.gptq import RoundingData, round_blocks
from edgeprune_export.graph_check import check_graph
from edgeprune_export.graph_sources import GRAPH_SOURCES as GRAPH_SOURCES
from edgeprune_export.graph_sources import graph_source_of
from edgeprune_export.model_card import Origin, write_card
from edgeprune_export.positions import check_causal, check_rope, context_note, context_tokens
from edgeprune_export.proving import BY_BLOCKS, needs_blocks, prove
from edgeprune_export.quantize import BLOCK_SIZES, FLOAT32, Precision, RoundedWeights
from edgeprune_export.sample_text import DEFAULT_TEXT
from edgeprune_export.sparsity_check import check_zeros
from edgeprune_export.targets import Target
from edgeprune_export.weights import Weights
from edgeprune_runtime.bundle import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENAI_CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    ZEROS,
    FileRecord,
    GraphSource,
    Layer,
    Manifest,
    ModelInfo,
    Parameters,
    Variant,
    data_file,
    golden_file,
    graph_file,
    transformers_js_dtype,
)
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.output import Kind, atomic_folder, check_output, check_space
from edgeprune_runtime.tokenizer import read_tokenizer

Progress = Callable[[str, float], None]
"""Hears the name of a stage and the share of it that is done."""

STAGES = ("rounding", "graph", "exactness", "parity", "packaging", "manifest")
"""In order; an export has those that it needs."""
BUNDLE = Kind("a bundle", (MANIFEST_FILE,))

REQUIRED_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
OPTIONAL_FILES = (
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
)

# Room for the graph, tokenizer and golden data beside the weights.
SPARE_BYTES = 64 << 20
VERSIONED = ("torch", "transformers", "onnx-ir", "onnxruntime", "tokenizers", "numpy")


def export(
    checkpoint: Path,
    out: Path,
    *,
    graph_source: str = "auto",
    force: bool = False,
    name: str | None = None,
    made_from: str | None = None,
    texts: Sequence[str] | None = None,
    precisions: Sequence[Precision] = (FLOAT32,),
    rounding: RoundingData | None = None,
    target: Target | None = None,
    notes: Sequence[str] = (),
    origin: Origin | None = None,
    max_memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the bundle of a checkpoint folder and return its manifest.

    Args:
        checkpoint: A dense or pruned checkpoint folder.
        out: The folder to write; it appears when it is complete and has passed the parity gate, or not at all.
        graph_source: Who builds the graph, of `GRAPH_SOURCES`; "auto" asks the architecture.
        force: Replace a bundle that stands at `out`.
        name: What to call the model; None takes it from the plan or the folder.
        made_from: The model in words, for one without a plan; None is the folder's name.
        texts: Real text for parity and golden data; None takes a few built-in paragraphs.
        precisions: One variant for each, the default one first. One whose weights are rounded is compared with a torch
            model of the same weights, and with the float32 model. Of several, one whose weights lose too much by that
            is left out, which the manifest's notes say.
        rounding: Text that weights of few bits are fitted to while they are rounded; None rounds each to the nearest.
        target: What the bundle is made for; what it chooses of the above is `targets.choose`'s business.
        notes: More sentences for the manifest.
        origin: Where the model comes from, for the model card; None takes it from the checkpoint's own card.
        max_memory_bytes: What this may take; a model that does not fit is proven block by block. None: half of this
            machine's.
        progress: Hears how far each of `STAGES` is.

    Raises:
        GateError: if the graph does not compute what the torch model computes, or no variant is good enough.
        EdgepruneError: if the checkpoint or the output folder cannot be used; nothing is left behind then.
    """
    report = progress or (lambda stage, share: None)
    out = out.absolute()
    check_bundle(out, force=force)
    config = load_config(checkpoint)
    source = graph_source_of(config.model_type, graph_source)
    check_causal(config)
    check_rope(config)
    check_precisions(precisions, source, config)
    for file in REQUIRED_FILES:
        if not (checkpoint / file).is_file():
            raise EdgepruneError(f"{checkpoint} has no {file}; a bundle needs the tokenizer, save it into this folder")
    for file in (*REQUIRED_FILES, *OPTIONAL_FILES):
        check_inside(checkpoint, file)
    licences = licence_texts(checkpoint)
    weights = Weights(checkpoint)
    parameters = Parameters(*weights.count_parameters())
    by_blocks = needs_blocks(parameters.all, source, max_memory_bytes)
    if by_blocks and any(precision.max_greedy_flips < 1 for precision in precisions):
        raise EdgepruneError(
            "--max-greedy-flips needs the whole model in memory, and this one is checked block by block, which "
            "compares no greedy continuations; leave it out, or raise --max-memory"
        )
    if target is not None:
        target.check_size(parameters.all, precisions)
    check_space(out, sum(precision.bits for precision in precisions) * parameters.all // 8 + SPARE_BYTES)
    with atomic_folder(out, force=force, kind=BUNDLE) as folder, ExitStack() as stack:
        plan = PrunePlan.load(checkpoint) if (checkpoint / PLAN_FILE).is_file() else None
        failed: list[str] = []
        records: dict[str, FileRecord] = {}
        variants: dict[str, Variant] = {}
        found: dict[str, Any] = {}
        for precision in precisions:

            def told(stage: str, share: float, name: str = precision.name) -> None:
                report(stage if len(precisions) == 1 else f"{name}, {stage}", share)

            rounded = RoundedWeights(weights, precision)
            if precision.is_data_aware and rounding is not None:
                data = rounding if rounding.journal else replace(rounding, journal=stack.enter_context(_journal(out)))
                ready = round_blocks(open_decoder(checkpoint), precision, data, partial(told, "rounding"))
                rounded = replace(rounded, ready=ready)
            record, found = _write_graph(folder, checkpoint, rounded, source, plan, told)
            try:
                variants[precision.name] = prove(
                    folder, checkpoint, source, rounded, texts or (DEFAULT_TEXT,), told, by_blocks=by_blocks
                )
            except FidelityError as error:
                failed.append(str(error))
                for file in (graph_file(precision.name), data_file(precision.name)):
                    (folder / file).unlink()
            else:
                records[data_file(precision.name)] = record
        if not variants:
            raise GateError("; ".join(failed))
        manifest = replace(_manifest(checkpoint, weights, parameters, variants, plan, name, made_from), results=found)
        manifest = replace(
            manifest,
            target=target.name if target else None,
            notes=(
                *manifest.notes,
                *((BY_BLOCKS,) if by_blocks else ()),
                *(target.sentences if target else ()),
                *notes,
                *(f"not written: {reason}" for reason in failed),
            ),
        )
        _write_files(folder, checkpoint, config, manifest, licences)
        if target is not None and target.package is not None:
            report("packaging", 0.0)
            manifest = target.package(folder, manifest)
        return _sealed(folder, manifest, records, origin or Origin.of_folder(checkpoint), report)


@contextmanager
def _journal(out: Path) -> Iterator[Journal]:
    """A journal on disk beside an output, for as long as the code inside runs."""
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as folder:
        yield Journal(Path(folder))


def check_bundle(out: Path, *, force: bool) -> None:
    """Check that a bundle may be written at `out`; call it before any long work.

    Raises:
        EdgepruneError: if something stands there that may not be replaced.
    """
    check_output(out, force=force, kind=BUNDLE)


def check_precisions(precisions: Sequence[Precision], source: GraphSource, config: PreTrainedConfig) -> None:
    """Check that a model's graph can have these precisions; call it before any long work.

    Raises:
        EdgepruneError: naming the one that it cannot have.
    """
    for precision in precisions:
        if not precision.is_rounded:
            continue
        if source != "decoder":
            raise EdgepruneError(
                f"precision {precision.name} is made by the decoder graph, and {config.model_type} has the {source} "
                "one; expected --precision fp32"
            )
        if precision.has_blocks and config.hidden_size % precision.block_size:
            raise EdgepruneError(
                f"--block-size {precision.block_size} does not divide the hidden_size {config.hidden_size}, which "
                "the embedding is stored in; expected one of "
                f"{', '.join(str(size) for size in BLOCK_SIZES if config.hidden_size % size == 0) or 'none'}"
            )


def _write_graph(
    folder: Path,
    checkpoint: Path,
    rounded: RoundedWeights,
    source: GraphSource,
    plan: PrunePlan | None,
    report: Progress,
) -> tuple[FileRecord, dict[str, Any]]:
    """Write graph and weights of a variant; their record, and what was counted in them."""
    weights, precision = rounded.weights, rounded.precision
    found: dict[str, Any] = {}
    graph = folder / graph_file(precision.name)
    graph.parent.mkdir(exist_ok=True)
    report("graph", 0.0)
    with ExternalData(folder / data_file(precision.name)) as data:
        if source == "decoder":
            model = decoder.build(rounded, data, partial(report, "graph"))
        else:
            model = traced.build(load_pruned(checkpoint), weights.layer_widths(), data, is_plain=source == "plain")
        check_graph(model, weights, is_plain=source == "plain")
    if plan is not None and plan.sparsity is not None:
        outputs = {name: LinearShape.of(linear_of(weights.model, name)).out_features for name in plan.sparsity.sides}
        zeros = check_zeros(model.graph, plan.sparsity, outputs)
        found[ZEROS] = asdict(zeros)
    ir.save(model, graph)
    report("graph", 1.0)
    return FileRecord(data.sha256, data.size_bytes), found


def _manifest(
    checkpoint: Path,
    weights: Weights,
    parameters: Parameters,
    variants: Mapping[str, Variant],
    plan: PrunePlan | None,
    name: str | None,
    made_from: str | None,
) -> Manifest:
    origin = plan.model if plan else made_from or checkpoint.resolve().name
    name = name or (f"{Path(origin).name} (pruned)" if plan else Path(origin).name)
    config = weights.config
    tokens = _special_tokens(checkpoint, config)
    return Manifest(
        edgeprune_version=edgeprune_runtime.__version__,
        model=ModelInfo(name, config.model_type, origin),
        default_variant=next(iter(variants)),
        variants=variants,
        layers=tuple(
            Layer(width.heads, width.kv_heads, width.head_dim, width.channels) for width in weights.layer_widths()
        ),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        context_tokens=context_tokens(config),
        bos_token_id=_one(tokens["bos_token_id"], config.vocab_size),
        eos_token_ids=_several(tokens["eos_token_id"], config.vocab_size),
        pad_token_id=_one(tokens["pad_token_id"], config.vocab_size),
        padding="both",
        parameters=parameters,
        files={},
        golden=golden_file(next(iter(variants))),
        versions={"python": platform.python_version(), **{package: version(package) for package in VERSIONED}},
        plan=plan.summary() if plan else None,
        notes=() if (note := context_note(config)) is None else (note,),
    )


def _special_tokens(checkpoint: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad a text; the generation config knows better than the model's config."""
    path = checkpoint / GENERATION_CONFIG_FILE
    generation = read_json(path) if path.is_file() else {}
    return {
        key: generation.get(key, getattr(config, key, None)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def _several(value: object, vocab_size: int) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(token for token in values if isinstance(token, int) and 0 <= token < vocab_size)


def _one(value: object, vocab_size: int) -> int | None:
    found = _several(value, vocab_size)
    return found[0] if found else None


def _write_files(
    folder: Path, checkpoint: Path, config: PreTrainedConfig, manifest: Manifest, licences: Mapping[str, bytes]
) -> None:
    for name, text in licences.items():
        (folder / name).write_bytes(text)
    for file in (*REQUIRED_FILES, *OPTIONAL_FILES):
        if (checkpoint / file).is_file():
            shutil.copyfile(checkpoint / file, folder / file)
    _state_in_tokenizer_config(folder)
    data = stock_config(read_json(checkpoint / CONFIG_FILE), str(checkpoint))
    for key in (UNSAFE_CONFIG_KEYS | {LAYOUT_KEY}) & set(data):
        del data[key]
    data |= {
        "architectures": [architecture(config.model_type).BASE],
        "head_dim": max(layer.head_dim for layer in manifest.layers),
        "transformers.js_config": {
            "dtype": transformers_js_dtype(manifest.default_variant),
            "use_external_data_format": {Path(variant.graph).name: 1 for variant in manifest.variants.values()},
        },
    }
    _write_json(folder / CONFIG_FILE, data)
    if not (folder / GENERATION_CONFIG_FILE).exists():
        _write_json(folder / GENERATION_CONFIG_FILE, _special_tokens(checkpoint, config))
    _write_json(folder / GENAI_CONFIG_FILE, genai_config(manifest, variant=manifest.default_variant))


def _state_in_tokenizer_config(folder: Path) -> None:
    """Write into the tokenizer's config what transformers.js looks for nowhere else.

    That is the chat template, and whether a text begins with a special token.
    """
    stated: dict[str, Any] = {}
    if (folder / CHAT_TEMPLATE_FILE).exists():
        try:
            stated["chat_template"] = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise EdgepruneError(
                f"{CHAT_TEMPLATE_FILE} of the checkpoint is not UTF-8 text ({error}); save the tokenizer again"
            ) from error
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.encode("a").ids[:1] != tokenizer.encode("a", add_special_tokens=False).ids[:1]:
        stated["add_bos_token"] = True
    path = folder / TOKENIZER_CONFIG_FILE
    _write_json(path, read_json(path) | stated)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sealed(
    folder: Path, manifest: Manifest, known: Mapping[str, FileRecord], origin: Origin, report: Progress
) -> Manifest:
    """Write model card and manifest, this with the records of all files; `known` saves reading a large one again."""
    report("manifest", 0.0)
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    files = {name: known.get(name) or FileRecord.of(folder / name) for name in names}
    sealed = write_card(folder, replace(manifest, files=files), origin)
    report("manifest", 1.0)
    return sealed
