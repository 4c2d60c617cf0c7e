"""Licence and notice of a model's folder: read by name, and nothing from outside the folder or of any size."""

from pathlib import Path

import pytest

from edgeprune import licences
from edgeprune.licences import licence_file_of, licence_texts
from edgeprune_runtime.errors import EdgepruneError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_licences_and_notices_are_read_as_they_are(folder: Path) -> None:
    written = {"LICENSE.txt": b"Do what you like \xa9", "NOTICE": b"By somebody"}
    for name, text in written.items():
        (folder / name).write_bytes(text)
    (folder / "README.md").write_text("no licence")
    (folder / "COPYING").mkdir()
    assert licence_texts(folder) == written


def test_a_notice_alone_is_no_licence() -> None:
    assert licence_file_of(["NOTICE", "README.md"]) is None
    assert licence_file_of(["NOTICE", "LICENSE.md", "COPYING"]) == "LICENSE.md"


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE"])
def test_link_out_of_the_folder_is_refused(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / name).symlink_to("../secret")
    with pytest.raises(EdgepruneError, match=rf"{name} links to .*secret, outside its folder; put the file itself"):
        licence_texts(folder)


def test_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / "LICENSE.md").write_text("mine")
    (folder / "LICENSE").symlink_to("LICENSE.md")
    assert licence_texts(folder) == {"LICENSE": b"mine", "LICENSE.md": b"mine"}


def test_link_that_leads_nowhere_is_no_licence(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("LICENSE")
    (folder / "NOTICE").symlink_to("absent")
    assert licence_texts(folder) == {}


def test_what_is_too_large_for_a_licence_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licences, "MAX_BYTES", 10)
    (folder / "LICENSE").write_bytes(b"x" * 10)
    assert licence_texts(folder)
    (folder / "LICENSE").write_bytes(b"x" * 11)
    with pytest.raises(EdgepruneError, match=r"LICENSE has 11 bytes, at most 10 were expected of a licence"):
        licence_texts(folder)
