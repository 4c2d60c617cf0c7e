"""The doctor's findings about machines and bundles of every sort, from what was read of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import DATA, GRAPH, edit_manifest, record, write_bundle

from edgeprune_runtime import cpu_features, doctor_bundle
from edgeprune_runtime.bundle import Bundle, GraphSource, Layer, Manifest, open_bundle
from edgeprune_runtime.cpu_features import ARM, X86, parse_cpuinfo, parse_sysctl
from edgeprune_runtime.doctor import Finding, Here, count_problems, examine_machine, look, release
from edgeprune_runtime.doctor_bundle import Numbers, estimate_bytes, examine_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.session import PREFILL_CHUNK_TOKENS

GIB = 1 << 30
IN_PLACE = Numbers(4, kv_copies=1)
SERVER = Here(
    python="3.11.7",
    edgeprune="0.1.0",
    onnxruntime="1.31.1",
    onnxruntime_packages=("onnxruntime",),
    versions={"tokenizers": "0.23.3", "onnxruntime-genai": "0.18.0", "torch": None, "transformers": None},
    providers=("CPUExecutionProvider",),
    cpu="A CPU",
    processor="x86_64",
    cpu_flags=frozenset({"avx2", "avx512vnni"}),
    cores=4,
    affinity=(0, 1),
    cpu_quota=None,
    threads=2,
    memory_bytes=16 * GIB,
    memory_limit_bytes=None,
    memory_available_bytes=8 * GIB,
    disk_free_bytes=90 * GIB,
)
ALIKE = (Layer(heads=4, kv_heads=2, head_dim=16, channels=24),) * 2


def about(findings: tuple[Finding, ...], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def only(findings: tuple[Finding, ...], subject: str) -> Finding:
    (finding,) = about(findings, subject)
    return finding


def machine(**changes: Any) -> tuple[Finding, ...]:
    return examine_machine(replace(SERVER, **changes))


def with_genai_config(folder: Path, **search: Any) -> Path:
    config = {"model": {"decoder": {"filename": GRAPH}}, "search": {"max_length": 64} | search}
    (folder / "genai_config.json").write_text(json.dumps(config))
    record(folder, Manifest.load(folder))
    return folder


def test_this_machine_can_be_read_and_judged(tmp_path: Path) -> None:
    findings = examine_machine(look(tmp_path))
    assert {"python", "onnxruntime", "tokenizers", "threads", "memory", "disk"} <= {each.subject for each in findings}
    assert only(findings, "providers").figures["providers"]


def test_capable_machine_has_no_problem() -> None:
    assert count_problems(machine()) == 0


def test_every_finding_but_ok_says_what_to_do_or_needs_nothing() -> None:
    for finding in machine(cpu_flags=frozenset(), memory_available_bytes=None, disk_free_bytes=1):
        assert finding.level == "ok" or finding.advice or "with it" in finding.found


@pytest.mark.parametrize("version", ["1.30.2", "1.9", "0.9.1"])
def test_old_onnxruntime_is_a_problem(version: str) -> None:
    finding = only(machine(onnxruntime=version), "onnxruntime")
    assert (finding.level, finding.advice) == ("problem", "pip install 'onnxruntime>=1.31'")


def test_two_packages_of_onnxruntime_are_a_problem() -> None:
    findings = about(machine(onnxruntime_packages=("onnxruntime", "onnxruntime-gpu")), "onnxruntime")
    assert [each.level for each in findings] == ["ok", "problem"]
    assert "onnxruntime, onnxruntime-gpu overwrite" in findings[1].found


@pytest.mark.parametrize(
    ("version", "level"), [("0.14.3", "problem"), ("0.15.0", "ok"), ("1.0.0rc1", "ok"), (None, "note")]
)
def test_onnxruntime_genai_must_know_layers_of_different_heads(version: str | None, level: str) -> None:
    finding = only(machine(versions={**SERVER.versions, "onnxruntime-genai": version}), "onnxruntime-genai")
    assert finding.level == level


def test_missing_torch_is_no_problem_of_a_device() -> None:
    assert only(machine(), "torch").level == "note"
    assert only(machine(versions={**SERVER.versions, "torch": "2.13.0"}), "torch").found == "2.13.0"


def test_provider_that_this_build_lacks_is_a_problem_and_an_unknown_one_an_error() -> None:
    finding = only(examine_machine(SERVER, "cuda"), "providers")
    assert (finding.level, "and not cuda" in finding.found) == ("problem", True)
    with pytest.raises(EdgepruneError, match="unknown provider 'cudda'"):
        examine_machine(SERVER, "cudda")


@pytest.mark.parametrize(
    ("provider", "package"),
    [
        ("cuda", "onnxruntime-gpu"),
        ("tensorrt", "onnxruntime-gpu"),
        ("directml", "onnxruntime-directml"),
        ("openvino", "onnxruntime-openvino"),
        ("coreml", "onnxruntime for macOS"),
        ("qnn", "an onnxruntime with qnn"),
    ],
)
def test_package_that_carries_a_missing_provider_is_named(provider: str, package: str) -> None:
    advice = only(examine_machine(SERVER, provider), "providers").advice
    assert advice == f"install {package}, 1.31 or later, in place of this one, or take --provider cpu"


def test_cpu_features_are_told_one_by_one_and_unknown_ones_are_not_guessed() -> None:
    findings = machine()
    assert [only(findings, feature.name).level for feature in X86] == ["ok", "ok", "note", "note", "note"]
    arm = machine(processor="aarch64", cpu_flags=frozenset({"asimddp", "i8mm"}))
    assert [only(arm, feature.name).level for feature in ARM] == ["ok", "ok", "note", "note", "note"]
    for unknown in (machine(cpu_flags=None), machine(processor="riscv64")):
        assert "unknown" in only(unknown, "cpu").found
        assert not {feature.name for feature in (*X86, *ARM)} & {each.subject for each in unknown}


def test_only_flags_of_every_core_count() -> None:
    text = "processor\t: 0\nFeatures\t: fp asimddp i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimddp\n"
    assert parse_cpuinfo(text) == {"fp", "asimddp"}
    assert parse_cpuinfo("flags\t\t: avx2 avx512_vnni amx_int8\n") == {"avx2", "avx512vnni", "amxint8"}
    assert parse_cpuinfo("isa : rv64imafdc\n") is None


def test_flags_of_a_mac_are_read_from_sysctl() -> None:
    text = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.avx2_0: 1\n"
    assert parse_sysctl(text) == {"dotprod", "avx20"}
    assert parse_sysctl("machdep.cpu.leaf7_features: RDWRFSGS AVX2 AVX512VNNI\n") == {"rdwrfsgs", "avx2", "avx512vnni"}
    assert parse_sysctl("") is None


def test_unreadable_cpuinfo_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_features, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(cpu_features.sys, "platform", "linux")
    assert cpu_features.cpu_flags() is None


def test_threads_and_memory_are_those_that_the_container_grants() -> None:
    findings = machine(cpu_quota=1.5, threads=2, memory_limit_bytes=GIB)
    assert only(findings, "threads").level == "note"
    assert "a quota of 1.5: 2 threads" in only(findings, "threads").found
    assert "limited to 1 GiB by the container" in only(findings, "memory").found
    assert only(findings, "memory").figures["room_bytes"] == GIB
    assert only(machine(memory_bytes=None, memory_available_bytes=None), "memory").level == "note"


def test_little_disk_is_said() -> None:
    assert only(machine(disk_free_bytes=1000), "disk").level == "note"


def test_version_is_read_up_to_its_first_word() -> None:
    assert [release(text) for text in ("1.31.1", "2.13.0+cpu", "0.15.0rc1", "nightly")] == [
        (1, 31, 1), (2, 13, 0), (0, 15, 0), (),
    ]  # fmt: skip


def test_whole_bundle_has_no_problem(both_folder: Path) -> None:
    findings = examine_bundle(both_folder, SERVER, verify=True)
    assert count_problems(findings) == 0
    assert "and the SHA-256" in only(findings, "files").found
    loaded, room = about(findings, "fp32")
    assert "has every operator of its graph" in loaded.found
    opened = open_bundle(both_folder)
    assert room.figures["weights_bytes"] == opened.size_bytes
    assert room.figures["kv_bytes_of_context"] == opened.kv_bytes_per_token * opened.manifest.context_tokens


def test_folder_that_is_no_bundle_and_variant_that_is_none_are_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match="is not a folder"):
        examine_bundle(tmp_path / "none", SERVER)
    with pytest.raises(EdgepruneError, match="has no variant 'int4'; it has fp32"):
        examine_bundle(folder, SERVER, variant="int4")


def test_each_file_that_is_not_as_stated_is_a_problem(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text("{}")
    findings = about(examine_bundle(folder, SERVER), "files")
    assert [each.level for each in findings] == ["problem", "problem"]
    assert all("copy the" in each.advice for each in findings)


def test_changed_bytes_show_only_when_verified(folder: Path) -> None:
    data = bytearray((folder / DATA).read_bytes())
    data[-1] ^= 1
    (folder / DATA).write_bytes(data)
    assert count_problems(examine_bundle(folder, SERVER)) == 0
    findings = examine_bundle(folder, SERVER, verify=True)
    assert "SHA-256" in only(findings, "files").found
    assert "damaged" in only(findings, "fp32").found


def test_operator_that_this_onnxruntime_does_not_know_is_a_problem_that_names_it(folder: Path) -> None:
    import onnx

    model = onnx.load(folder / GRAPH, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Tanh").op_type = "TanhOfTomorrow"
    onnx.save(model, folder / GRAPH)
    record(folder, replace(Manifest.load(folder), versions={"onnxruntime": "9.0.0"}))
    finding = only(examine_bundle(folder, SERVER), "fp32")
    assert finding.level == "problem"
    assert "TanhOfTomorrow" in finding.found
    assert finding.advice == "install onnxruntime 9.0.0, which it was checked with"


def test_provider_that_is_missing_is_a_problem_of_the_variant(both_folder: Path) -> None:
    assert "no provider 'cuda'" in only(examine_bundle(both_folder, SERVER, provider="cuda"), "fp32").found


def test_bundle_that_does_not_fit_is_a_problem(both_folder: Path) -> None:
    bundle = open_bundle(both_folder)
    tight = replace(SERVER, memory_limit_bytes=estimate_bytes(bundle, 96, IN_PLACE) - 1)
    problem = about(examine_bundle(both_folder, tight), "fp32")[1]
    assert problem.level == "problem"
    assert "take a smaller variant" in problem.advice


def test_tokens_that_fit_are_named_where_the_whole_context_does_not(folder: Path) -> None:
    edit_manifest(folder, context_tokens=100_000)
    bundle = open_bundle(folder)
    here = replace(SERVER, memory_limit_bytes=estimate_bytes(bundle, 5_050, IN_PLACE))
    note = about(examine_bundle(folder, here), "fp32")[1]
    assert (note.level, note.figures["tokens_that_fit"]) == ("note", 5_000)
    assert note.advice == "keep to about 5,000 tokens"


def test_unknown_memory_is_a_note(both_folder: Path) -> None:
    here = replace(SERVER, memory_bytes=None, memory_available_bytes=None)
    assert about(examine_bundle(both_folder, here), "fp32")[1].level == "note"


@pytest.mark.parametrize(
    ("variant", "processor", "flags", "said"),
    [
        ("int4", "x86_64", {"avx2"}, "reads prompts slower than fp32, and writes each token faster: "),
        ("int8", "x86_64", {"avx2"}, "but no AVX-512 VNNI or AVX-VNNI"),
        ("int4", "x86_64", set(), "slow on this CPU, which has no AVX-512 VNNI or AVX-VNNI"),
        ("int8", "aarch64", set(), "slow on this CPU, which has no dotprod or i8mm"),
        ("int8", "aarch64", {"asimddp"}, None),
        ("int8-dynamic", "x86_64", {"avx2"}, "no AVX-512 VNNI or AVX-VNNI"),
        ("int4", "x86_64", {"avxvnni"}, None),
        ("fp16", "x86_64", {"avx2"}, "does not compute in float16"),
        ("fp16", "aarch64", {"asimdhp"}, None),
        ("fp32", "x86_64", set(), None),
    ],
)
def test_precision_is_held_against_the_cpu(
    folder: Path, variant: str, processor: str, flags: set[str], said: str | None
) -> None:
    manifest = Manifest.load(folder)
    renamed = {variant: manifest.variants["fp32"]}
    record(folder, replace(manifest, variants=renamed, default_variant=variant))
    here = replace(SERVER, processor=processor, cpu_flags=frozenset(flags))
    suits = about(examine_bundle(folder, here), variant)[2:]
    assert [each.level for each in suits] == (["note"] if said else [])
    assert said is None or said in suits[0].found


@pytest.mark.parametrize(
    ("level", "processor", "flags", "said"),
    [
        (0, "x86_64", {"avx512vnni"}, "inputs are not rounded (accuracy level 0)"),
        (1, "AMD64", {"avx2"}, "inputs are not rounded (accuracy level 1)"),
        (0, "aarch64", set(), None),
        (4, "x86_64", {"avx512vnni"}, None),
        (4, "x86_64", {"avx2"}, "no AVX-512 VNNI or AVX-VNNI"),
        (None, "x86_64", {"avx2"}, "no AVX-512 VNNI or AVX-VNNI"),
    ],
)
def test_accuracy_level_of_the_manifest_decides_what_a_cpu_must_have(
    folder: Path, level: int | None, processor: str, flags: set[str], said: str | None
) -> None:
    manifest = Manifest.load(folder)
    variant = replace(manifest.variants["fp32"], accuracy_level=level)
    record(folder, replace(manifest, variants={"int8": variant}, default_variant="int8"))
    here = replace(SERVER, processor=processor, cpu_flags=frozenset(flags))
    suits = about(examine_bundle(folder, here), "int8")[2:]
    assert [each.level for each in suits] == (["note"] if said else [])
    assert said is None or said in suits[0].found


@pytest.mark.parametrize(("graph_source", "bytes_per_channel"), [("decoder", 4), ("traced", 0)])
def test_rotary_table_of_the_whole_context_is_counted_where_a_graph_has_one(
    folder: Path, graph_source: GraphSource, bytes_per_channel: int
) -> None:
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    variants = {"fp32": replace(bundle.variant, graph_source=graph_source)}
    short, long = (
        estimate_bytes(replace(bundle, manifest=replace(manifest, variants=variants, context_tokens=tokens)), 32)
        for tokens in (100, 1100)
    )
    assert long - short == 1000 * bytes_per_channel * max(layer.head_dim for layer in manifest.layers)


def test_another_variant_that_does_not_run_is_a_note_and_one_that_does_is_named(folder: Path) -> None:
    manifest = Manifest.load(folder)
    missing = replace(manifest.variants["fp32"], graph="onnx/absent.onnx")
    (folder / "onnx/absent.onnx").write_bytes(b"")
    record(folder, replace(manifest, variants={**manifest.variants, "int4": missing}))
    findings = examine_bundle(folder, SERVER)
    assert count_problems(findings) == 0
    assert only(findings, "int4").level == "note"
    findings = examine_bundle(folder, SERVER, variant="int4")
    assert only(findings, "int4").level == "problem"
    assert (only(findings, "variants").advice, count_problems(findings)) == ("--variant fp32", 1)


def test_genai_that_is_too_old_for_different_kv_heads_is_a_problem(folder: Path, tmp_path: Path) -> None:
    old = replace(SERVER, versions={**SERVER.versions, "onnxruntime-genai": "0.14.1"})
    differ = about(examine_bundle(with_genai_config(folder), old), "onnxruntime-genai")
    assert differ[0].level == "problem"
    assert "0.14.1 cannot run it" in differ[0].found
    alike = with_genai_config(write_bundle(tmp_path / "alike", layers=ALIKE))
    assert only(examine_bundle(alike, old), "onnxruntime-genai").level == "ok"
    absent = replace(SERVER, versions={**SERVER.versions, "onnxruntime-genai": None})
    notes = about(examine_bundle(folder, absent), "onnxruntime-genai")
    assert [each.level for each in notes] == ["note", "ok"]
    assert "0.15 or later" in notes[0].found


def test_max_length_that_allocates_too_much_is_a_problem_with_one_that_fits(folder: Path) -> None:
    per_token = open_bundle(folder).kv_bytes_per_token
    with_genai_config(folder, max_length=SERVER.memory_available_bytes // per_token)
    here = replace(SERVER, memory_limit_bytes=GIB)
    finding = only(examine_bundle(folder, here), "onnxruntime-genai")
    assert finding.level == "problem"
    fits = int(finding.advice.removeprefix("set_search_options(max_length=").removesuffix(")"))
    assert fits * per_token < GIB < finding.figures["estimated_bytes"]  # type: ignore[operator]
    absent = replace(here, versions={**SERVER.versions, "onnxruntime-genai": None})
    assert about(examine_bundle(folder, absent), "onnxruntime-genai")[-1].level == "note"


@pytest.mark.parametrize("search", [{"max_length": "many"}, {"max_length": 0}])
def test_broken_genai_config_is_a_problem(folder: Path, search: dict[str, Any]) -> None:
    assert only(examine_bundle(with_genai_config(folder, **search), SERVER), "onnxruntime-genai").level == "problem"


def test_genai_config_of_no_variant_is_a_problem_and_none_at_all_a_note(folder: Path) -> None:
    assert only(examine_bundle(folder, SERVER), "onnxruntime-genai").level == "note"
    with_genai_config(folder)
    (folder / "genai_config.json").write_text(
        json.dumps({"model": {"decoder": {"filename": "onnx/other.onnx"}}, "search": {"max_length": 8}})
    )
    record(folder, Manifest.load(folder))
    assert "which is no variant" in only(examine_bundle(folder, SERVER), "onnxruntime-genai").found


def test_estimate_grows_with_context_weights_and_a_rounded_head(both_folder: Path) -> None:
    bundle = open_bundle(both_folder)
    table_bytes = 4 * bundle.manifest.layers[0].head_dim * bundle.manifest.context_tokens
    assert estimate_bytes(bundle, 0) == doctor_bundle.BASE_BYTES + bundle.size_bytes + table_bytes
    per_token = estimate_bytes(bundle, 5_000) - estimate_bytes(bundle, 4_999)
    assert per_token == 2 * bundle.kv_bytes_per_token
    in_place = estimate_bytes(bundle, 5_000, IN_PLACE) - estimate_bytes(bundle, 4_999, IN_PLACE)
    assert in_place == bundle.kv_bytes_per_token
    less = estimate_bytes(bundle, 5_000) - estimate_bytes(bundle, 5_000, Numbers(4, keeps_logits=True))
    assert less == 4 * bundle.manifest.vocab_size * (2 * PREFILL_CHUNK_TOKENS - 1)
    assert estimate_bytes(bundle, 5_000, Numbers(2)) < estimate_bytes(bundle, 5_000)
    assert estimate_bytes(bundle, 5_000, Numbers(2, are_widened=True)) > estimate_bytes(bundle, 5_000)
    manifest = bundle.manifest
    rounded = replace(manifest, parameters=replace(manifest.parameters, all=bundle.size_bytes))
    head_bytes = 4 * manifest.vocab_size * manifest.hidden_size
    assert estimate_bytes(Bundle(bundle.folder, rounded, "fp32"), 0) - estimate_bytes(bundle, 0) == head_bytes


def test_copy_of_a_bundle_is_as_good(both_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(both_folder, tmp_path / "copy")
    assert count_problems(examine_bundle(copy, SERVER, verify=True)) == 0
