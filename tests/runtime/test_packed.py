"""A packed copy is run on the machine that it was made on; any other says why not, and the variant runs without."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import edit_record
from tiny_bundle import DATA, GRAPH, write_bundle

from edgeprune_export.packing import pack
from edgeprune_runtime import packed
from edgeprune_runtime.bench import bench, report_bench
from edgeprune_runtime.bundle import Bundle, open_bundle
from edgeprune_runtime.doctor import look
from edgeprune_runtime.doctor_bundle import examine_bundle
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.packed import RECORD_FILE, Host, find_packed, packed_folder
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.validate import validate

HERE = Host("1.31.1", "x86_64", "A CPU", ("AVX2", "AVX-512 VNNI"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bundle with a packed copy, and beside it the key of who made it. Read only."""
    place = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(place / "data"))
        bundle = write_bundle(place / "bundle")
        pack(open_bundle(bundle))
        yield bundle


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "bundle")


def refusal(folder: Path) -> str:
    """Why the copy is not run; the variant must run without it."""
    bundle = open_bundle(folder)
    found = find_packed(bundle)
    assert found is not None
    assert not found.is_usable
    decoder = Decoder(bundle, threads=1)
    assert decoder.packed is None
    assert np.isfinite(decoder.forward(np.array([[1, 2]]))[0]).all()
    assert "\n" not in found.sentence("fp32")
    return found.refusal


def test_copy_is_run_and_a_bundle_without_one_has_none(made: Path, tmp_path: Path) -> None:
    bundle = open_bundle(made)
    found = find_packed(bundle)
    assert found is not None
    assert found.sentence("fp32") == f"fp32 runs from its packed copy, {made / 'packed/fp32'}"
    decoder = Decoder(bundle, threads=1)
    assert decoder.packed == found
    shutil.copytree(made, tmp_path / "plain", ignore=shutil.ignore_patterns("packed"))
    assert find_packed(open_bundle(tmp_path / "plain")) is None
    assert find_packed(replace(bundle, ort_file="ort/model.ort")) is None


def test_copy_in_a_bundle_that_was_moved_is_run(folder: Path) -> None:
    found = find_packed(open_bundle(folder))
    assert found is not None
    assert found.is_usable


def test_another_provider_runs_without_it(made: Path) -> None:
    found = find_packed(open_bundle(made), "cuda")
    assert found is not None
    assert found.refusal == "it is for the provider cpu, and cuda was asked for"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"onnxruntime": "1.30.0"}, "made by onnxruntime 1.31.1, and here is 1.30.0"),
        ({"features": ("AVX2",)}, "made for A CPU .*VNNI.*, and here is A CPU"),
        ({"processor": "aarch64"}, "here is A CPU .aarch64"),
        ({"cpu": "Another CPU"}, ""),
        ({}, ""),
    ],
)
def test_version_and_instruction_sets_must_be_the_same(changes: dict[str, Any], words: str) -> None:
    difference = HERE.difference(replace(HERE, **changes))
    assert bool(difference) == bool(words)
    assert re.search(words, difference)


def test_where_features_are_unknown_the_processor_must_be_the_same() -> None:
    unknown = replace(HERE, features=None)
    assert unknown.difference(unknown) == ""
    assert "unknown features" in unknown.difference(replace(unknown, cpu="Another CPU"))
    assert HERE.difference(unknown)


def test_other_machine_runs_without_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(Host.here(), onnxruntime="9.9")
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: other))
    assert refusal(folder).endswith("and here is 9.9")


@pytest.mark.parametrize("key", [None, b"", bytes(32)])
def test_copy_of_somebody_else_is_never_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    if key is not None:
        (tmp_path / "other/edgeprune").mkdir(parents=True)
        (tmp_path / "other/edgeprune/packed.key").write_bytes(key)
    assert refusal(folder) == "it was not made here by this user"


def test_key_is_for_its_owner_alone(made: Path) -> None:
    mode = (made.parent / "data/edgeprune/packed.key").stat().st_mode
    assert mode & 0o077 == 0


@pytest.mark.parametrize("changes", [{"graph": "other.onnx"}, {"files": {}}, {"host": {}}, {"seal": ""}, {"more": 1}])
def test_record_that_was_edited_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit_record(folder / "packed/fp32", is_sealed=False, **changes)
    assert refusal(folder) == "it was not made here by this user"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object was expected"),
        ("{}", "schema_version"),
        ('{"schema_version": 1}', "seal"),
        ('{"schema_version": 2}', "another version"),
        ('{"schema_version": 1, "seal": "x", "a": ' + 900 * "[" + 900 * "]" + "}", "not made here"),
        (" " * 2_000_000, "bytes, at most"),
    ],
)
def test_broken_record_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / "packed/fp32" / RECORD_FILE).write_text(text)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graph": "../../onnx/model.onnx"}, "a relative path inside the folder"),
        ({"graph": "absent.onnx"}, "does not list its graph"),
        ({"files": {"../x": {"sha256": "0" * 64, "size_bytes": 1}}}, "a relative path inside the folder"),
        ({"files": {"model.onnx": {"sha256": "x", "size_bytes": 1}}}, "64 lower-case hex digits"),
        ({"files": {"model.onnx": {"sha256": "0" * 64, "size_bytes": -1}}}, "a whole number"),
        ({"host": {}}, "onnxruntime"),
    ],
)
def test_sealed_record_is_checked_all_the_same(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_record(folder / "packed/fp32", is_sealed=True, **changes)
    assert words in refusal(folder)


def test_files_must_be_those_of_the_record(folder: Path) -> None:
    data = folder / "packed/fp32/model.onnx_data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert "bytes, packed.json states" in refusal(folder)
    data.unlink()
    assert "has no file" in refusal(folder)
    data.write_bytes(whole)
    graph = folder / "packed/fp32/model.onnx"
    graph.write_bytes(graph.read_bytes()[::-1])
    assert "SHA-256" in refusal(folder)
    (folder / "packed/fp32" / RECORD_FILE).unlink()
    assert "has no file 'packed.json'" in refusal(folder)


def test_changed_weights_are_found_by_validate_and_doctor(folder: Path) -> None:
    data = folder / "packed/fp32/model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    files = validate(open_bundle(folder), threads=1).checks
    assert [(check.name, check.passed) for check in files] == [("files", False)]
    assert "model.onnx_data does not have the SHA-256 that packed.json states" in files[0].detail
    levels = [
        finding.level for finding in examine_bundle(folder, look(folder), verify=True) if "packed" in finding.found
    ]
    assert levels == ["problem"]


def test_copy_of_a_variant_that_has_changed_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "edgeprune.json").read_text())
    manifest["files"][GRAPH]["sha256"] = "0" * 64
    (folder / "edgeprune.json").write_text(json.dumps(manifest))
    assert refusal(folder) == "fp32 has changed since it was made"
    assert DATA in manifest["files"]


def test_links_are_not_followed(folder: Path, made: Path) -> None:
    shutil.rmtree(folder / "packed/fp32")
    (folder / "packed/fp32").symlink_to(made / "packed/fp32")
    assert "through a link" in refusal(folder)
    (folder / "packed/fp32").unlink()
    (folder / "packed/fp32").symlink_to("fp32")
    assert "through a link" in refusal(folder)
    (folder / "packed/fp32").unlink()
    shutil.copytree(made / "packed/fp32", folder / "packed/fp32")
    graph = folder / "packed/fp32/model.onnx"
    graph.unlink()
    graph.symlink_to(made / "packed/fp32/model.onnx")
    assert "leads out of" in refusal(folder)
    graph.unlink()
    graph.symlink_to("model.onnx")
    assert "through a link" in refusal(folder)


@pytest.mark.parametrize("name", ["../fp32", "/tmp", "a/b", "a\0b", "..", ""])
def test_variant_of_a_hostile_name_has_no_folder(made: Path, name: str) -> None:
    bundle = open_bundle(made)
    hostile = Bundle(
        bundle.folder, replace(bundle.manifest, variants={name: bundle.variant}, default_variant=name), name
    )
    with pytest.raises(EdgepruneError):
        packed_folder(hostile)
    found = find_packed(hostile)
    assert found is None or not found.is_usable


def test_bench_and_doctor_say_that_it_is_run(made: Path) -> None:
    result = bench([made], rounds=1, prompt_tokens=4, generate_tokens=2, threads=1)
    assert result.sides[0].is_packed
    assert "A: bundle (packed copy)" in report_bench(result).tables[0].columns
    (finding,) = [each for each in examine_bundle(made, look(made)) if "packed" in each.found]
    assert (finding.level, finding.subject) == ("ok", "fp32")


def test_doctor_says_why_it_is_not_run_and_what_to_do(folder: Path) -> None:
    (folder / "packed/fp32" / RECORD_FILE).unlink()
    (finding,) = [each for each in examine_bundle(folder, look(folder)) if "packed" in each.found]
    assert (finding.level, finding.subject) == ("note", "fp32")
    assert finding.advice == "edgeprune pack BUNDLE --variant fp32 makes it anew"


def test_user_without_a_home_can_run_bundles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(packed.Path, "home", homeless)
    assert "no home folder" in refusal(folder)
