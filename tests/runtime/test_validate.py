"""Validation passes a right bundle and fails each kind of wrong one; hostile golden data is refused."""

import dataclasses
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import edit_weight, record, write_bundle

from edgeprune_runtime.bundle import GOLDEN_FILE, Manifest, open_bundle
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.golden import GoldenCase, load_golden, save_golden
from edgeprune_runtime.session import Decoder, KvCache
from edgeprune_runtime.validate import Validation, _check_greedy, report_validation, validate
from edgeprune_runtime.worker import Request, measure


def _validate(folder: Path) -> Validation:
    return validate(open_bundle(folder), threads=1)


def _failed(folder: Path) -> set[str]:
    return {check.name for check in _validate(folder).checks if not check.passed}


def test_right_bundles_pass(both_folder: Path, right_folder: Path) -> None:
    heard: list[str] = []
    result = validate(open_bundle(both_folder), threads=1, on_check=lambda check: heard.append(check.name))
    assert result.passed
    result.ensure_passed()
    assert heard == [check.name for check in result.checks]
    assert heard[-2:] == ["batch padded left", "batch padded right"]
    assert [check.name for check in _validate(right_folder).checks][-1] == "batch padded right"
    assert "batch padded left" not in {check.name for check in _validate(right_folder).checks}
    assert report_validation(result).to_dict()["verdicts"] == [
        {"text": "the bundle computes what its model computed", "passed": True}
    ]


def _swap_two_heads(weight: Any) -> Any:
    return np.concatenate([weight[16:32], weight[:16], weight[32:]])


def _shift_by_one(cache: Any) -> Any:
    return np.roll(cache, 1, axis=0)


@pytest.mark.parametrize(
    ("name", "change"), [("o_0", _swap_two_heads), ("cos", _shift_by_one), ("down_1", lambda weight: weight * np.nan)]
)
def test_wrong_weight_fails(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    edit_weight(folder, name, change)
    assert "prefill logits" in _failed(folder)
    with pytest.raises(GateError, match="is not valid: prefill logits"):
        _validate(folder).ensure_passed()


def test_wrong_logits_of_a_cache_with_room_fail(both_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Decoder.forward

    def wrong_in_place(self: Decoder, ids: Any, mask: Any = None, cache: Any = None, **more: Any) -> Any:
        logits, after = forward(self, ids, mask, cache, **more)
        return logits + (1.0 if cache is not None and cache.room else 0.0), after

    monkeypatch.setattr(Decoder, "forward", wrong_in_place)
    assert _failed(both_folder) == {"cached decoding"}


def test_greedy_tokens_are_written_in_place(both_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(_caches_stepped(both_folder, monkeypatch, _greedy_check))


def test_a_measured_worker_writes_in_place(both_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(_caches_stepped(both_folder, monkeypatch, _measured))


def _greedy_check(folder: Path) -> None:
    bundle = open_bundle(folder)
    _check_greedy(Decoder(bundle, threads=1), load_golden(bundle))


def _measured(folder: Path) -> None:
    measure(Request(str(folder), None, "cpu", 1, prompt_tokens=8, generate_tokens=6, vocab_size=100))


def _caches_stepped(folder: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Path], None]) -> list[bool]:
    """Whether each cache that takes one more token has room for it."""
    has_room: list[bool] = []
    step = Decoder.step

    def noted(self: Decoder, ids: Any, cache: KvCache) -> Any:
        has_room.append(cache.room is not None and cache.tokens < cache.room.tokens)
        return step(self, ids, cache)

    monkeypatch.setattr(Decoder, "step", noted)
    run(folder)
    assert has_room
    return has_room


def test_ignored_padding_fails_the_batches_only(folder: Path) -> None:
    edit_weight(folder, "low", lambda weight: weight * 0)
    assert _failed(folder) == {"batch padded left", "batch padded right"}


def test_false_claim_of_padding_fails(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", padding="right")
    record(folder, dataclasses.replace(Manifest.load(folder), padding="both"))
    assert "batch padded left" in _failed(folder)


def test_wrong_file_fails_before_anything_is_run(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("end", "eos"))
    result = _validate(folder)
    assert [check.name for check in result.checks] == ["files"]
    assert not result.passed


def _edit_golden(folder: Path, change: Callable[[GoldenCase], GoldenCase]) -> None:
    cases = load_golden(open_bundle(folder))
    save_golden(folder / GOLDEN_FILE, [change(case) for case in cases])
    record(folder, Manifest.load(folder))


def test_other_greedy_tokens_fail(folder: Path) -> None:
    _edit_golden(folder, lambda case: dataclasses.replace(case, greedy=(case.greedy + 1) % 200))
    assert _failed(folder) == {"greedy tokens"}


def test_near_tie_does_not_fail(folder: Path) -> None:
    def tie(case: GoldenCase) -> GoldenCase:
        logits = case.logits.copy()
        top, second = np.argsort(-logits[0])[:2]
        logits[0, second] = logits[0, top] + 1e-6
        return dataclasses.replace(case, logits=logits)

    _edit_golden(folder, tie)
    assert "argmax agreement" not in _failed(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: dataclasses.replace(case, ids=case.ids + 10_000), "outside the vocabulary"),
        (lambda case: dataclasses.replace(case, positions=case.positions + 1000), "outside its sequence"),
        (lambda case: dataclasses.replace(case, logits=case.logits[:, 1:]), "do not fit"),
        (lambda case: dataclasses.replace(case, logits=case.logits * np.inf), "not finite"),
    ],
)
def test_golden_case_that_does_not_fit_is_refused(
    folder: Path, change: Callable[[GoldenCase], GoldenCase], message: str
) -> None:
    _edit_golden(folder, change)
    with pytest.raises(EdgepruneError, match=message):
        _validate(folder)


def _header_of(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return file.getvalue()


def _npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


HEADERS = ["{'descr': (", "{'descr': '<i8,,', 'fortran_order': False, 'shape': (1,)}", "{'descr': " + "-" * 9000]


@pytest.mark.parametrize("content", [_header_of((1 << 50,)), _pickled(), b"", b"no npy", *map(_npy, HEADERS)])
def test_hostile_array_is_refused_before_memory_is_taken(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / GOLDEN_FILE, "w") as archive:
        for part in ("ids", "positions", "logits", "greedy"):
            archive.writestr(f"{part}_0.npy", content)
    record(folder, Manifest.load(folder))
    with pytest.raises(EdgepruneError, match="is not golden data"):
        _validate(folder)


@pytest.mark.parametrize("content", [b"", b"not a zip"])
def test_broken_golden_file_is_one_error(folder: Path, content: bytes) -> None:
    (folder / GOLDEN_FILE).write_bytes(content)
    record(folder, Manifest.load(folder))
    with pytest.raises(EdgepruneError, match="is not golden data"):
        _validate(folder)


def _encrypted(archive: bytearray) -> None:
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # of an entry, and of its line in the directory
        archive[archive.find(sign) + flags] |= 1


def _not_deflated(archive: bytearray) -> None:
    begin = archive.find(b".npy") + len(".npy") + 20  # past the extra field of 64-bit sizes
    archive[begin : begin + 8] = b"\xff" * 8


@pytest.mark.parametrize("damage", [_encrypted, _not_deflated])
def test_golden_entry_that_does_not_unpack_is_one_error(folder: Path, damage: Callable[[bytearray], None]) -> None:
    cases = {f"{part}_0": np.arange(4) for part in ("ids", "positions", "logits", "greedy")}
    np.savez_compressed(folder / GOLDEN_FILE, **cases)
    archive = bytearray((folder / GOLDEN_FILE).read_bytes())
    damage(archive)
    (folder / GOLDEN_FILE).write_bytes(archive)
    record(folder, Manifest.load(folder))
    with pytest.raises(EdgepruneError, match="is not golden data") as error:
        _validate(folder)
    assert "\n" not in str(error.value)


def test_no_golden_case_is_not_a_pass(folder: Path) -> None:
    save_golden(folder / GOLDEN_FILE, [])
    record(folder, Manifest.load(folder))
    with pytest.raises(EdgepruneError, match="no golden sequence"):
        _validate(folder)
