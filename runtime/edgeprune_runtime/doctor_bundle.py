"""Whether a bundle is whole, loads on a machine and fits it: the half of the doctor that looks at a bundle."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime

from edgeprune_runtime.bundle import GENAI_CONFIG_FILE, Bundle, check_file, find_bundle
from edgeprune_runtime.cpu_features import FAST_INT8, X86_MACHINES, features_of
from edgeprune_runtime.doctor import GENAI, MIN_GENAI, Finding, Here, Level, dotted, release
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.packed import find_packed
from edgeprune_runtime.report import format_bytes
from edgeprune_runtime.session import (
    ORT_ERRORS,
    PREFILL_CHUNK_TOKENS,
    keeps_logits,
    make_session,
    provider_name,
    writes_in_place,
)
from edgeprune_runtime.untrusted import Fields, Json, read_json

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CHAT_TOKENS = 1024
"""A short conversation: what a bundle must at least hold to be of use."""

BASE_BYTES = 80 << 20
"""Python with ONNX Runtime, tokenizer and graph, and the buffers of one step; measured."""

HOW_ESTIMATED = (
    "what is needed is an estimate: weights once (mapped from the file, so the kernel can take pages back), the KV "
    "cache (twice where a step cannot write its keys and values behind the old ones), logits (of two pieces of a "
    f"prompt where all are computed), the rotary table of the whole context, {BASE_BYTES >> 20} MiB for the rest"
)
ESTIMATES_ADVICE = "edgeprune bench BUNDLE measures; --memory LIMIT tries a smaller device"

MAX_GENAI_CONFIG_BYTES = 1 << 20
FLOAT_LEVELS = (0, 1)
"""Of `Variant.accuracy_level`: products with quantised weights are in float32."""

LOAD_ERRORS: tuple[type[Exception], ...] = (MemoryError, *ORT_ERRORS)
HALF = "tensor(float16)"


@dataclass(frozen=True)
class Numbers:
    """How a variant computes.

    Attributes:
        kv_bytes: of a number in its KV cache.
        are_widened: all is turned into float32 beside it.
        kv_copies: of the cache; 2 where a step's new one stands beside the old one.
        keeps_logits: of a prompt the logits of the last position alone are computed.
    """

    kv_bytes: int
    are_widened: bool = False
    kv_copies: int = 2
    keeps_logits: bool = False

    def kv_per_token(self, bundle: Bundle) -> int:
        """Bytes of one token's keys and values over all layers."""
        return bundle.kv_bytes_per_token // 4 * self.kv_bytes


FLOAT32 = Numbers(4)


def examine_bundle(
    folder: Path, here: Here, *, variant: str | None = None, provider: str = "cpu", verify: bool = False
) -> tuple[Finding, ...]:
    """Whether a bundle is whole, loads here and fits; every variant is looked at, the chosen one decides.

    What keeps another variant than the chosen one (None: the manifest's default) from running is a note. Of a bundle's
    file in the ORT format, given as `folder`, nothing but that file is tried.

    Raises:
        EdgepruneError: if the folder is no bundle, or has no such variant.
    """
    bundle = find_bundle(folder, variant)
    chosen = bundle.variant_name
    broken = dict(_broken_files(bundle, verify=verify))
    findings = [_describe(bundle), *_examine_files(bundle, broken, verify=verify)]
    fitting = []
    for name in (chosen,) if bundle.ort_file else bundle.manifest.variants:
        of_variant = replace(bundle, variant_name=name)
        is_broken = not broken.keys().isdisjoint(of_variant.graph_files)
        found = [
            *_examine_variant(of_variant, here, provider, is_broken=is_broken),
            *_examine_packed(of_variant, provider, verify=verify),
        ]
        if all(finding.level != "problem" for finding in found):
            fitting.append(name)
        findings += found if name == chosen else [_lowered(finding) for finding in found]
    if fitting and chosen not in fitting:
        findings.append(Finding("note", "variants", f"{', '.join(fitting)} would run here", f"--variant {fitting[0]}"))
    if not bundle.ort_file:
        findings += _examine_genai(bundle, here)
    return (*findings, Finding("note", "estimates", HOW_ESTIMATED, ESTIMATES_ADVICE))


def _describe(bundle: Bundle) -> Finding:
    manifest = bundle.manifest
    others = [name for name in manifest.variants if name != bundle.variant_name]
    variants = f"variant {bundle.variant_name}" + (f" (also {', '.join(others)})" if others else "")
    alike = "all alike" if len(set(manifest.layers)) == 1 else "different widths"
    return Finding(
        "ok",
        "bundle",
        f"{manifest.model.name}: {manifest.parameters.all:,} parameters in {len(manifest.layers)} layers ({alike}), "
        f"context {manifest.context_tokens:,} tokens, {variants}",
    )


def _broken_files(bundle: Bundle, *, verify: bool) -> Iterator[tuple[str, str]]:
    """Files that are not as the manifest says, and why."""
    for name in bundle.manifest.files:
        try:
            check_file(bundle, name, verify=verify)
        except EdgepruneError as error:
            yield name, str(error)
        except OSError as error:
            yield name, f"{name} cannot be read ({error.strerror}); check its permissions"


def _examine_files(bundle: Bundle, broken: Mapping[str, str], *, verify: bool) -> Iterator[Finding]:
    for reason in broken.values():
        yield _problem("files", reason)
    if not broken:
        count = f"all {len(bundle.manifest.files)} files have the sizes that the manifest states"
        if verify:
            yield Finding("ok", "files", f"{count}, and the SHA-256")
        else:
            yield Finding("ok", "files", count, "--verify compares their SHA-256 as well")


def _examine_variant(bundle: Bundle, here: Here, provider: str, *, is_broken: bool) -> Iterator[Finding]:
    name = bundle.variant_name
    if is_broken:
        yield Finding("problem", name, "its files are damaged", "copy the bundle again, whole")
        return
    try:
        session = _load(bundle, provider)
    except EdgepruneError as error:
        made_with = bundle.manifest.versions.get("onnxruntime")
        newer = made_with and release(made_with) > release(here.onnxruntime)
        problem = _problem(name, str(error))
        checked_with = f"install onnxruntime {made_with}, which it was checked with"
        yield replace(problem, advice=checked_with) if newer else problem
        return
    yield Finding("ok", name, f"ONNX Runtime {here.onnxruntime} has every operator of its graph, on {provider}")
    kv_type = {node.name: str(node.type) for node in session.get_inputs()}.get("past_key_values.0.key", "")
    is_half = kv_type == HALF
    numbers = Numbers(
        kv_bytes=2 if is_half else 4,
        are_widened=is_half and provider == "cpu" and "fp16" not in here.features,
        kv_copies=1 if writes_in_place(bundle, provider, kv_type) else 2,
        keeps_logits=keeps_logits(session),
    )
    yield _examine_room(bundle, here, numbers)
    if provider == "cpu" and (slow := _examine_precision(bundle, here)) is not None:
        yield slow


def _examine_packed(bundle: Bundle, provider: str, *, verify: bool) -> Iterator[Finding]:
    """Whether a variant's packed copy is run, if it has one."""
    packed = find_packed(bundle, provider)
    if packed is None:
        return
    name = bundle.variant_name
    if packed.is_usable:
        size = format_bytes(packed.size_bytes)
        found = f"runs from its packed copy ({size}), made here for this CPU and onnxruntime {onnxruntime.__version__}"
        try:
            if verify:
                packed.check_bytes()
            yield Finding("ok", name, found)
        except EdgepruneError as error:
            yield Finding("problem", name, f"runs from its packed copy, and {error}", packed.advice(name))
    else:
        yield Finding("note", name, f"runs without its packed copy: {packed.refusal}", packed.advice(name))


def _load(bundle: Bundle, provider: str) -> "InferenceSession":
    """A variant's graph, loaded to be looked at.

    On the CPU the weights stay in the file, neither rearranged nor folded, so that this takes a moment and next to no
    memory; another provider has to load it as it would for a run.

    Raises:
        EdgepruneError: if ONNX Runtime cannot.
    """
    if provider != "cpu":
        return make_session(bundle.graph_path, provider=provider, is_sparse=bundle.is_sparse)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(bundle.graph_path), options, providers=[provider_name(provider)])
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise EdgepruneError(
            f"ONNX Runtime cannot load {bundle.graph_path}: {reason}; make the bundle again"
        ) from error


def estimate_bytes(bundle: Bundle, tokens: int, numbers: Numbers = FLOAT32) -> int:
    """Memory that a variant takes with so many tokens in its context; an estimate, not a bound.

    The weights count once: they are mapped from the file, and where kernels rearrange a copy, the mapped pages are
    given back. Keys and values count twice where a step's old and new ones stand beside each other; the logits of a
    piece of a long prompt do where all of them are computed. A head of small integers is turned into float32 where a
    prompt is multiplied by it; where it is not, other buffers of a long prompt take that much (measured). Cosines and
    sines of all positions are computed when a graph of the decoder kind is loaded; a file in the ORT format holds them.
    """
    manifest = bundle.manifest
    is_quantised = bundle.size_bytes < manifest.parameters.all * numbers.kv_bytes // 2
    head = 4 * manifest.vocab_size * manifest.hidden_size if is_quantised else 0
    logits = 4 * manifest.vocab_size * (1 if numbers.keeps_logits else min(2 * PREFILL_CHUNK_TOKENS, tokens))
    cache = numbers.kv_copies * numbers.kv_per_token(bundle) * tokens
    widened = 2 * (bundle.size_bytes + cache) if numbers.are_widened else 0
    has_table = bundle.variant.graph_source == "decoder" and not bundle.ort_file
    table = 4 * max(layer.head_dim for layer in manifest.layers) * manifest.context_tokens if has_table else 0
    return BASE_BYTES + bundle.size_bytes + head + cache + logits + widened + table


def _examine_room(bundle: Bundle, here: Here, numbers: Numbers) -> Finding:
    """Whether the weights and a conversation fit into memory."""
    name, context, room = bundle.variant_name, bundle.manifest.context_tokens, here.room_bytes
    short = min(CHAT_TOKENS, context)
    kv = numbers.kv_per_token(bundle)
    little, whole = (estimate_bytes(bundle, tokens, numbers) for tokens in (short, context))
    figures: dict[str, Json] = {
        "weights_bytes": bundle.size_bytes,
        "kv_bytes_per_1000_tokens": 1000 * kv,
        "kv_bytes_of_context": context * kv,
        "estimated_bytes": little,
        "estimated_bytes_of_context": whole,
        "room_bytes": room,
    }
    found = (
        f"weights {format_bytes(bundle.size_bytes)}, KV cache {format_bytes(1000 * kv)} per 1,000 tokens and "
        f"{format_bytes(context * kv)} at the full context; needs about {format_bytes(little)} for {short:,} tokens, "
    )
    if context > short:
        found += f"{format_bytes(whole)} for {context:,}, "
    if room is None:
        return Finding("note", name, f"{found}of an unknown memory", "measure: edgeprune bench BUNDLE", figures)
    found += f"of {format_bytes(room)} available"
    if little > room:
        advice = "take a smaller variant, prune more, or free memory; edgeprune bench measures what it really takes"
        return Finding("problem", name, found, advice, figures)
    if whole > room:
        fits = _tokens_that_fit(bundle, room, numbers)
        figures["tokens_that_fit"] = fits
        return Finding("note", name, found, f"keep to about {fits:,} tokens", figures)
    return Finding("ok", name, found, figures=figures)


def _tokens_that_fit(bundle: Bundle, room_bytes: int, numbers: Numbers) -> int:
    """The largest hundred of tokens whose estimate is within the room."""
    low, high = 0, bundle.manifest.context_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if estimate_bytes(bundle, middle, numbers) <= room_bytes else (low, middle - 1)
    return math.floor(low / 100) * 100


def _examine_precision(bundle: Bundle, here: Here) -> Finding | None:
    """Whether a variant's precision suits the CPU; None where nothing is to be said."""
    name = bundle.variant_name
    if here.cpu_flags is None or not features_of(here.processor):
        return None
    level = bundle.variant.accuracy_level
    if level in FLOAT_LEVELS:
        # Of int4 it is the head, which has 8 bits.
        if here.processor.lower() not in X86_MACHINES:
            return None
        return Finding(
            "note",
            name,
            f"slow on this CPU: its inputs are not rounded (accuracy level {level}), and for that ONNX Runtime turns "
            "weights of 8 bits into float32 at every step",
            "export it with --accuracy-level 4, or take fp32",
        )
    if name in ("int8", "int8-dynamic", "int4") and not here.features & FAST_INT8:
        wanted = " or ".join(each.name for each in features_of(here.processor) if each.name in FAST_INT8)
        if "AVX2" in here.features:
            return Finding(
                "note",
                name,
                f"reads prompts slower than fp32, and writes each token faster: this CPU has AVX2, but no {wanted}",
                "take fp32 where prompts are long and answers short; edgeprune bench BUNDLE --variant ... measures",
            )
        return Finding(
            "note",
            name,
            f"small, and slow on this CPU, which has no {wanted}",
            "compare with fp32: edgeprune bench BUNDLE --variant ...",
        )
    if name == "fp16" and "fp16" not in here.features:
        return Finding(
            "note",
            name,
            "this CPU does not compute in float16: ONNX Runtime turns it into float32 as it runs",
            "take fp32 or int8 on the CPU; fp16 is for GPUs",
        )
    return None


def _problem(subject: str, error: str) -> Finding:
    """An error as a finding: what follows its semicolon is what to do."""
    found, _, advice = error.rpartition("; ") if "; " in error else (error, "", "make the bundle again")
    return Finding("problem", subject, found, advice)


def _lowered(finding: Finding) -> Finding:
    """A problem of a variant that was not chosen, as a note."""
    return replace(finding, level="note") if finding.level == "problem" else finding


def _examine_genai(bundle: Bundle, here: Here) -> Iterator[Finding]:
    """Whether onnxruntime-genai can run the bundle here."""
    subject, least = GENAI, dotted(MIN_GENAI)
    version = here.versions["onnxruntime-genai"]
    differ = len({(layer.kv_heads, layer.head_dim) for layer in bundle.manifest.layers}) > 1
    if differ and version is not None and release(version) < MIN_GENAI:
        yield Finding(
            "problem",
            subject,
            f"{version} cannot run it: its layers have different KV heads",
            f"pip install 'onnxruntime-genai>={least}'",
        )
    elif differ and version is None:
        yield Finding("note", subject, f"its layers have different KV heads, so it takes {least} or later")
    if not (bundle.folder / GENAI_CONFIG_FILE).is_file():
        yield Finding("note", subject, f"the bundle has no {GENAI_CONFIG_FILE}", "it runs with edgeprune all the same")
        return
    try:
        config = Fields(
            read_json(bundle.file(GENAI_CONFIG_FILE), limit_bytes=MAX_GENAI_CONFIG_BYTES), GENAI_CONFIG_FILE
        )
        max_length = config.fields("search").count("max_length", low=1)
        graph = config.fields("model").fields("decoder").path("filename")
    except EdgepruneError as error:
        yield _problem(subject, str(error))
        return
    yield _examine_max_length(bundle, here, max_length, graph)


def _examine_max_length(bundle: Bundle, here: Here, max_length: int, graph: str) -> Finding:
    """Whether the KV cache that onnxruntime-genai allocates at once for `max_length` tokens fits."""
    subject, manifest = GENAI, bundle.manifest
    name = next((name for name, each in manifest.variants.items() if each.graph == graph), None)
    if name is None:
        return Finding("problem", subject, f"{GENAI_CONFIG_FILE} names {graph}, which is no variant", "export again")
    per_token = (Numbers(2) if name == "fp16" else FLOAT32).kv_per_token(bundle)
    cache_bytes = max_length * per_token
    wanted = BASE_BYTES + replace(bundle, variant_name=name).size_bytes + cache_bytes
    found = (
        f"allocates a KV cache of {format_bytes(cache_bytes)} at once (max_length {max_length:,}), about "
        f"{format_bytes(wanted)} with the weights of {name}"
    )
    figures: dict[str, Json] = {"max_length": max_length, "kv_bytes": cache_bytes, "estimated_bytes": wanted}
    if here.room_bytes is not None and wanted > here.room_bytes:
        fits = max(0, (here.room_bytes - wanted + cache_bytes) // per_token)
        level: Level = "note" if here.versions[subject] is None else "problem"
        advice = f"set_search_options(max_length={fits})" if fits else "take a smaller variant"
        return Finding(level, subject, f"{found}; {format_bytes(here.room_bytes)} are available", advice, figures)
    return Finding("ok", subject, found, figures=figures)
