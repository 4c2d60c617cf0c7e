"""A bundle survives its round trip, and nothing in a hostile or damaged one is believed."""

import json
import re
from pathlib import Path

import pytest
from tiny_bundle import DATA, GRAPH, edit_manifest

from edgeprune_runtime.bundle import MANIFEST_FILE, Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError


def test_manifest_survives_round_trip(both_folder: Path) -> None:
    manifest = Manifest.load(both_folder)
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest


def test_opens_and_verifies_a_whole_bundle(both_folder: Path) -> None:
    bundle = open_bundle(both_folder, verify=True)
    assert bundle.variant_name == "fp32"
    assert bundle.graph_path == both_folder / GRAPH
    assert bundle.size_bytes == sum((both_folder / name).stat().st_size for name in (GRAPH, DATA))
    assert bundle.kv_bytes_per_token == 2 * 4 * (2 * 16 + 1 * 16)


def test_unknown_variant_names_those_there_are(both_folder: Path) -> None:
    with pytest.raises(EdgepruneError, match="no variant 'int4'; it has fp32"):
        open_bundle(both_folder, "int4")


def test_no_folder_and_no_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match="is not a folder"):
        open_bundle(tmp_path / "absent")
    with pytest.raises(EdgepruneError, match="so it is not a bundle"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".ort", "x" * 300 + "/ort/model.ort", "x/" * 3000])
def test_name_too_long_for_the_system_is_no_bundle(name: str) -> None:
    with pytest.raises(EdgepruneError, match=r"is no usable path .*; give the folder of a bundle"):
        open_bundle(name)


@pytest.mark.parametrize("name", [GRAPH, DATA, "golden.npz", "tokenizer.json"])
def test_missing_or_truncated_file_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(EdgepruneError, match=r"has \d+ bytes, the manifest states"):
        open_bundle(folder)
    path.unlink()
    with pytest.raises(EdgepruneError, match="has no file"):
        open_bundle(folder)


def test_flipped_byte_is_found_by_verify(folder: Path) -> None:
    content = bytearray((folder / DATA).read_bytes())
    content[-1] ^= 1
    (folder / DATA).write_bytes(content)
    open_bundle(folder)
    with pytest.raises(EdgepruneError, match="SHA-256"):
        open_bundle(folder, verify=True)


ESCAPES = [
    "../secret",
    "/etc/passwd",
    "onnx/../../secret",
    "C:/secret",
    "onnx\\model",
    "onnx//model",
    "./x",
    "",
    "a\x00b",
]


@pytest.mark.parametrize("path", ESCAPES)
def test_path_that_leaves_the_folder_is_refused(folder: Path, path: str) -> None:
    (folder.parent / "secret").write_text("secret")
    document = json.loads((folder / MANIFEST_FILE).read_text())
    document["variants"]["fp32"]["graph"] = path
    edit_manifest(folder, variants=document["variants"], files=document["files"] | {path: document["files"][GRAPH]})
    with pytest.raises(EdgepruneError, match="a relative path inside the folder"):
        open_bundle(folder)


def test_listed_file_outside_is_refused(folder: Path) -> None:
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    edit_manifest(folder, files=files | {"../secret": files[GRAPH]})
    with pytest.raises(EdgepruneError, match="a relative path inside the folder"):
        open_bundle(folder)


def test_link_out_of_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    (folder / DATA).rename(outside)
    (folder / DATA).symlink_to(outside)
    with pytest.raises(EdgepruneError, match="leads out of"):
        open_bundle(folder)


VARIANT = {"graph": GRAPH, "data": [DATA], "graph_source": "decoder", "tolerance": 1e-3, "parity": {}}
WRONG = [
    ("schema_version", 2, "this edgeprune reads 1"),
    ("schema_version", True, "whole number"),
    ("layers", [], "0 entries"),
    ("layers", [{"heads": 3, "kv_heads": 2, "head_dim": 8, "channels": 8}], "not a multiple"),
    ("layers", [{"heads": 1 << 40, "kv_heads": 2, "head_dim": 8, "channels": 8}], "whole number in 1"),
    ("layers", "none", "a list was expected"),
    ("vocab_size", -1, "whole number in 1"),
    ("vocab_size", 1 << 40, "whole number in 1"),
    ("context_tokens", 1.5, "whole number"),
    ("padding", "left", "one of both, right"),
    ("default_variant", "int4", "not among its variants"),
    ("eos_token_ids", [10**6], "whole number in 0"),
    ("files", {}, "does not list"),
    ("model", None, "an object was expected"),
    ("golden", "/golden.npz", "a relative path"),
    ("notes", ["why", 1], "a list of strings"),
    ("variants", {"fp32": {**VARIANT, "accuracy_level": 5}}, "whole number in 0..4"),
    ("variants", {"fp32": {**VARIANT, "tolerance": 10**400}}, "a number of at least 0"),
    ("variants", {"fp32": {**VARIANT, "tolerance": -1}}, "a number of at least 0"),
    ("variants", {"\ud800": VARIANT}, "has the name '\\ud800'"),
    ("variants", {"\x1b[2J": VARIANT}, "has the name '\\x1b[2J'"),
    ("target", "\ud800", "a string was expected"),
    ("notes", ["\udfff"], "a list of strings"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_wrong_field_is_named(folder: Path, key: str, value: object, message: str) -> None:
    edit_manifest(folder, **{key: value})
    with pytest.raises(EdgepruneError, match=re.escape(message)) as error:
        open_bundle(folder)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_manifest_without_notes_is_read(folder: Path) -> None:
    document = json.loads((folder / MANIFEST_FILE).read_text())
    del document["notes"]
    (folder / MANIFEST_FILE).write_text(json.dumps(document))
    assert open_bundle(folder).manifest.notes == ()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"schema_version": NaN}', b"[" * 100_000])
def test_manifest_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(EdgepruneError, match=MANIFEST_FILE):
        open_bundle(folder)


def test_huge_manifest_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / MANIFEST_FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EdgepruneError, match="at most"):
        open_bundle(folder)
