"""The model card of a bundle, `README.md`: what was done to the model, what it cost, and how to load it everywhere.

The text is a pure function of the manifest and of what the checkpoint says of its origin; the code that it shows is in
`snippets`. A pruned checkpoint has a shorter one, from which the bundle's takes base model and licence. Names and notes
come from checkpoints of strangers: none of them may become Markdown, HTML or YAML.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import edgeprune_runtime
from edgeprune.checkpoint import CARD_FILE as CARD_FILE
from edgeprune.groups import LayerWidths
from edgeprune.licences import licence_file_of
from edgeprune.plan import PrunePlan
from edgeprune.sources import HUB_ID, NAMED, Source
from edgeprune_export.snippets import SNIPPETS, optimum_obstacle, snippets
from edgeprune_export.sparsity_check import found_zeros
from edgeprune_runtime.bundle import (
    CHAT_TEMPLATE_FILE,
    MANIFEST_FILE,
    TOKENIZER_CONFIG_FILE,
    FileRecord,
    Layer,
    Manifest,
)
from edgeprune_runtime.report import Report, describe_machine, format_cell
from edgeprune_runtime.untrusted import Fields, Json, read_json

MEASURED = "measured"
"""Key of a manifest's results: how the bundle did against the dense model, as `measured_results` says it."""

CHECKPOINT_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("CHECKPOINT", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
"""

LICENCE_ID = re.compile(r"[\w.-]+")
FRONT_MATTER_LINE = re.compile(
    r"^(license|license_name|license_link|base_model):[ \t]*(['\"]?)(\S+)\2[ \t]*$", re.MULTILINE
)
MAX_CARD_BYTES = 1 << 20
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Origin:
    """What a model says of where it comes from; None where it does not say.

    `base_model` is a hub id. `licence`, `licence_name` and `licence_link` are those of a model card's front matter.
    """

    base_model: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> "Origin":
        """What the front matter of a checkpoint's own model card says."""
        card = folder / CARD_FILE
        if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
            return cls()
        parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
        if len(parts) < 3 or parts[0].strip():
            return cls()
        stated = {key: value for key, _, value in FRONT_MATTER_LINE.findall(parts[1])}
        return cls(
            stated.get("base_model"), stated.get("license"), stated.get("license_name"), stated.get("license_link")
        )

    @classmethod
    def of_source(cls, source: Source) -> "Origin":
        """What is known of a model that was opened to be pruned; it is the base model of what comes out."""
        if source.kind == "folder":
            return replace(cls.of_folder(source.path), licence=source.licence)
        named = NAMED.get(source.name.lower())
        hub_id = source.path.as_posix() if source.kind == "hub" else named.hub_id if named else None
        return cls(hub_id, source.licence)


def write_card(folder: Path, manifest: Manifest, origin: Origin) -> Manifest:
    """Write a bundle's card and then its manifest, which vouches for the card too; return the manifest.

    `manifest` must list every other file of the folder already.
    """
    text = model_card(manifest, origin, has_chat=_has_chat(folder), licence_file=licence_file_of(manifest.files))
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    files = {**manifest.files, CARD_FILE: FileRecord.of(folder / CARD_FILE)}
    sealed = replace(manifest, files=dict(sorted(files.items())))
    sealed.save(folder)
    return sealed


def add_results(folder: Path, results: Mapping[str, Json], origin: Origin) -> Manifest:
    """Put measured results into the manifest and the card of a bundle that nobody else reads yet.

    Two files change one after the other, so call it before the folder gets its name.
    """
    manifest = Manifest.load(folder)
    return write_card(folder, replace(manifest, results={**manifest.results, **results}), origin)


def model_card(
    manifest: Manifest, origin: Origin | None = None, *, has_chat: bool = False, licence_file: str | None = None
) -> str:
    """The text of a bundle's `README.md`.

    Args:
        manifest: of the bundle, with the records of its files.
        origin: what the model says of itself; None: nothing.
        has_chat: there is a chat template, so that code shows a conversation.
        licence_file: a file of the bundle that holds the licence's text.
    """
    origin = origin or Origin()
    parts = [
        _front_matter(origin, licence_file, _tags(manifest), "transformers.js"),
        f"# {plain(manifest.model.name)}",
        _summary(manifest),
        *_removed(manifest.plan, manifest.layers),
        *_zeros(manifest),
        *_variants(manifest),
        *_measured(manifest),
        *_use(manifest, has_chat),
        *_notes(manifest),
        *_licence(origin, licence_file),
    ]
    return "\n\n".join(parts) + "\n"


def checkpoint_card(
    source: Source, plan: PrunePlan, widths: Sequence[LayerWidths], *, licence_file: str | None = None
) -> str:
    """The text of a pruned checkpoint's `README.md`, of the widths that its layers now have.

    A bundle that is made from the checkpoint later says of its origin what this says.
    """
    summary, origin = plan.summary(), Origin.of_source(source)
    layers = [Layer(width.heads, width.kv_heads, width.head_dim, width.channels) for width in widths]
    parts = [
        _front_matter(origin, licence_file, ["edgeprune", *_tags_of(summary)], "transformers"),
        f"# {plain(f'{source.title} (pruned)')}",
        f"A checkpoint in the form of Hugging Face's transformers, made from {plain(plan.model)} by edgeprune "
        f"{edgeprune_runtime.__version__}.",
        *_removed(summary, layers),
        *([_items(plan.notes)] if plan.notes else []),
        *([f"Some of the weights that stay are zero. {_pattern(summary['sparsity'])}."] if summary["sparsity"] else []),
        "## Use",
        f"`CHECKPOINT` stands for the path of this folder.\n\n```python\n{CHECKPOINT_CODE}```",
        "`trust_remote_code` runs `modeling_edgeprune.py` of this folder, where the layers differ in their widths; "
        "`edgeprune.load_pruned` runs none of its code. For devices: `edgeprune export CHECKPOINT`.",
        *_licence(origin, licence_file),
    ]
    return "\n\n".join(parts) + "\n"


def measured_results(report: Report) -> dict[str, Json]:
    """What a bundle's manifest and card keep of a verdict: the measured table, which comes first, and the sentences."""
    table = report.tables[0]
    return {
        MEASURED: {
            "columns": list(table.columns),
            "rows": [list(row) for row in table.rows],
            "notes": list(table.notes),
            "verdicts": [verdict.text for verdict in report.verdicts],
            "machine": describe_machine(report.machine),
        }
    }


def plain(text: str) -> str:
    """A stranger's text as Markdown of one line that shows it as it is: no markup, no HTML, no links, no formulas."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    line = re.sub(r"[\\`*_{}\[\]<>|~#&$!@]", r"\\\g<0>", line)
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", line)  # what GitHub would make links of


def _items(texts: Iterable[str]) -> str:
    """A list of strangers' texts; one that begins as a list does must not begin another."""
    return "\n".join(f"- {re.sub(r'^([-+=]|[0-9]+(?=[.)]( |$)))', _escaped, plain(text))}" for text in texts)


def _escaped(found: re.Match[str]) -> str:
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def _has_chat(folder: Path) -> bool:
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        return True
    return "chat_template" in read_json(folder / TOKENIZER_CONFIG_FILE, limit_bytes=MAX_CONFIG_BYTES)


def _tags(manifest: Manifest) -> list[str]:
    of_plan = _tags_of(manifest.plan) if manifest.plan is not None else []
    others = [name for name in manifest.variants if name != "fp32"]
    return ["onnx", "onnxruntime", "onnxruntime-genai", "edgeprune", *of_plan, *others]


def _tags_of(plan: Mapping[str, Json]) -> list[str]:
    pruned = ["pruned"] if Fields(plan, "plan").number("ratio_reached") > 0 else []
    return [*pruned, *(["sparse"] if plan.get("sparsity") else [])]


def _front_matter(origin: Origin, licence_file: str | None, tags: Sequence[str], library: str) -> str:
    """YAML for the Hugging Face hub; its strings are JSON's, which are YAML's too."""
    data: dict[str, Json] = {}
    if origin.base_model is not None and HUB_ID.fullmatch(origin.base_model):
        data["base_model"] = origin.base_model
    if origin.licence is not None and LICENCE_ID.fullmatch(origin.licence):
        data["license"] = origin.licence
        for key, value in (("license_name", origin.licence_name), ("license_link", origin.licence_link)):
            if value is not None:
                data[key] = value
    elif licence_file is not None:
        data |= {"license": "other", "license_link": licence_file}
    data |= {"library_name": library, "pipeline_tag": "text-generation"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in data.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _summary(manifest: Manifest) -> str:
    model, count = manifest.model, len(manifest.layers)
    return (
        f"`{_code(model.model_type)}`, {manifest.parameters.all:,} parameters in {count} layers, as an ONNX bundle for "
        f"ONNX Runtime and what builds on it. Made from {plain(model.source)} by edgeprune "
        f"{plain(manifest.edgeprune_version)}; every graph here was held against its torch model before it was written."
    )


def _removed(stated: Mapping[str, Json] | None, layers: Sequence[Layer]) -> Iterator[str]:
    yield "## What was removed"
    if stated is None:
        yield "Nothing: this is the model as it was, in another form."
    else:
        plan = Fields(stated, "plan")
        before, after = plan.count("parameters_before"), plan.count("parameters_after")
        if before == after:
            yield "No head and no channel: all layers are as wide as they were."
        else:
            blocks = plan.count("block_parameters_before")
            words = (
                f"{plan.number('ratio_reached'):.1%} of all parameters ({before:,} became {after:,}), or "
                f"{(before - after) / max(1, blocks):.1%} of those of the decoder blocks. Attention heads or MLP "
                "channels, as the widths below say, have left the matrices whole, which are smaller for it. "
                f"Importance {plain(plan.text('method'))}, allocation {plain(plan.text('allocation'))}, refit "
                f"{plain(plan.text('refit'))}{_recovered(stated)}."
            )
            yield words + _calibration(stated)
    rows = [(run, layer.heads, layer.kv_heads, layer.head_dim, layer.channels) for run, layer in _runs(layers)]
    yield _table(("layers", "query heads", "KV heads", "head_dim", "channels"), rows)


def _recovered(plan: Mapping[str, Json]) -> str:
    recover = plan.get("recover", "none")  # plans of earlier bundles do not name it
    return "" if recover == "none" else f", recover {plain(str(recover))}"


def _calibration(plan: Mapping[str, Json]) -> str:
    if not isinstance(record := plan.get("calibration"), Mapping):
        return ""
    fields = Fields(record, "plan.calibration")
    return (
        f" Calibrated on {fields.count('sequences')} x {fields.count('length_tokens')} tokens of "
        f"{plain(fields.text('source'))}."
    )


def _runs(layers: Sequence[Layer]) -> Iterator[tuple[str, Layer]]:
    """Neighbouring layers of the same widths as one row: ("4-7", widths)."""
    for layer, run in itertools.groupby(enumerate(layers), lambda numbered: numbered[1]):
        numbers = [number for number, _ in run]
        yield (str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"), layer


def _zeros(manifest: Manifest) -> Iterator[str]:
    zeros, record = found_zeros(manifest), (manifest.plan or {}).get("sparsity")
    if zeros is None or not isinstance(record, Mapping):
        return
    yield "## Zeros in the weights"
    yield (
        f"{_pattern(record)}: {zeros.sparsity:.2%} of {zeros.weights:,} weights are zero, counted in the "
        "graph. Kernels for CPUs multiply by zeros as by other numbers, so they win no time there."
    )


def _pattern(record: Mapping[str, Json]) -> str:
    fields = Fields(record, "plan.sparsity")
    return (
        f"Pattern {plain(fields.text('pattern'))} in {fields.count('linears')} Linears (scope "
        f"{plain(fields.text('scope'))}, method {plain(fields.text('method'))}, layout {plain(fields.text('layout'))})"
    )


def _variants(manifest: Manifest) -> Iterator[str]:
    yield "## Variants"
    rows = []
    for name, variant in manifest.variants.items():
        size_bytes = sum(manifest.files[file].size_bytes for file in (variant.graph, *variant.data))
        lost = Fields(variant.fidelity, f"variants.{name}.fidelity")
        rows.append(
            (
                plain(name) + (" (default)" if name == manifest.default_variant else ""),
                f"`{_code(variant.graph)}`",
                f"{size_bytes / 1e6:,.1f}",
                f"{8 * size_bytes / manifest.parameters.all:.2f}",
                f"{Fields(variant.parity, 'parity').number('max_abs_error'):.1e}" if variant.parity else None,
                f"{lost.number('perplexity_ratio'):.3f}" if lost.values else None,
                f"{lost.number('argmax_agreement'):.1%}" if lost.values else None,
                f"{lost.number('mean_kl'):.3g}" if lost.values else None,
                f"{lost.number('greedy_flips'):.0%}" if lost.values.get("greedy_flips") is not None else None,
            )
        )
    columns = (
        *("variant", "graph", "MB", "bits per parameter", "logits differ from torch by"),
        *("perplexity against float32", "same likeliest token", "KL divergence, nats", "other greedy continuations"),
    )
    yield _table(columns, rows)
    yield (
        "The torch model that a graph is compared with has the same rounded weights; the last four columns compare "
        "those weights with float32 ones, on a short text."
    )


def _measured(manifest: Manifest) -> Iterator[str]:
    if (results := manifest.results.get(MEASURED)) is None:
        return
    fields = Fields.nested(f"results.{MEASURED}", results)
    rows = [[_cell(cell) for cell in row] for row in fields.items("rows") if isinstance(row, Sequence)]
    yield "## Results"
    yield _table([plain(column) for column in fields.texts("columns")], rows)
    yield _items((*fields.texts("verdicts"), *fields.texts("notes")))
    yield f"Measured on {plain(fields.text('machine'))}."


def _cell(cell: Json) -> str:
    return plain(format_cell(cell if isinstance(cell, str | int | float) else None))


def _use(manifest: Manifest, has_chat: bool) -> Iterator[str]:
    yield "## Use"
    yield "`BUNDLE` stands for the path of this folder."
    code = snippets(manifest, has_chat=has_chat)
    for name, snippet in SNIPPETS.items():
        if snippet.title:
            yield f"### {snippet.title}"
        if name not in code:
            yield f"Optimum's `ORTModelForCausalLM` cannot load this model: {optimum_obstacle(manifest)}."
            continue
        remarks = [
            f"`{snippet.install}`" if snippet.install else "",
            "" if snippet.language == "sh" else snippet.remark,
        ]
        if any(remarks):
            yield ". ".join(filter(None, remarks))
        yield f"```{snippet.language}\n{code[name]}```"
        if snippet.language == "sh" and snippet.remark:
            yield snippet.remark


def _notes(manifest: Manifest) -> Iterator[str]:
    yield "## Good to know"
    sides = {"both": "on the left or on the right", "right": "on the right only"}[manifest.padding]
    kv_numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in manifest.layers)
    stated = (manifest.plan or {}).get("notes")
    of_plan = [note for note in stated if isinstance(note, str)] if isinstance(stated, list | tuple) else []
    yield _items(
        (
            f"Context: {manifest.context_tokens:,} tokens; the KV cache takes {kv_numbers:,} numbers for each.",
            f"Batches may be padded {sides}; no zeros may stand between the tokens of a first prompt.",
            f"{MANIFEST_FILE} holds the widths of every layer, the versions it was made with, and the SHA-256 of every "
            "file.",
            *of_plan,
            *manifest.notes,
        )
    )


def _licence(origin: Origin, licence_file: str | None) -> Iterator[str]:
    yield "## Licence"
    if origin.licence is not None:
        name = f" ({plain(origin.licence_name)})" if origin.licence_name else ""
        yield f"{plain(origin.licence)}{name}, as the original model states it."
    if licence_file is not None:
        yield f"See [{licence_file}]({licence_file}), which came with the model."
    elif origin.licence is None:
        yield "Not stated: that of the base model holds."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | int | None]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|"]
    lines += [f"| {' | '.join('–' if cell is None else str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _code(text: str) -> str:
    """A stranger's text between backticks."""
    return "".join(letter for letter in text if letter.isprintable() and letter not in "`|")
