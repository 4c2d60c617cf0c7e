"""The texts of a model's licence: files of its folder that go wherever its weights go."""

import os
from collections.abc import Collection
from pathlib import Path

from edgeprune_runtime.errors import EdgepruneError

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
NOTICE_FILES = ("NOTICE", "NOTICE.txt", "NOTICE.md")
"""What licences such as Apache's want to be passed on; no licence by itself."""

TEXT_FILES = (*LICENCE_FILES, *NOTICE_FILES)
MAX_BYTES = 1 << 20
"""Of each; the text of the GPL has 35,000."""


def licence_texts(folder: Path) -> dict[str, bytes]:
    """What the licence and notice files of a model's folder hold, by name; empty where it has none.

    Raises:
        EdgepruneError: if one is a link out of the folder, or larger than such a text is.
    """
    texts = {}
    for name in TEXT_FILES:
        check_inside(folder, name)
        file = folder / name
        if not file.is_file():
            continue
        if (size_bytes := file.stat().st_size) > MAX_BYTES:
            raise EdgepruneError(
                f"{file} has {size_bytes} bytes, at most {MAX_BYTES} were expected of a licence's text; put the text "
                "alone there"
            )
        texts[name] = file.read_bytes()
    return texts


def licence_file_of(names: Collection[str]) -> str | None:
    """The one of these files that holds the licence itself."""
    return next((name for name in LICENCE_FILES if name in names), None)


def check_inside(folder: Path, name: str) -> None:
    """Refuse a link out of a model's folder: its target would be published with what is made of the model.

    The hub's cache is an exception: its snapshots are links into the `blobs` of the same repository.

    Raises:
        EdgepruneError: naming the link.
    """
    place = folder.resolve()
    allowed = [place]
    if place.parent.name == "snapshots":
        allowed.append(place.parent.parent / "blobs")
    target = Path(os.path.realpath(folder / name))  # unlike resolve(), takes a link that leads in a circle
    if not any(target.is_relative_to(each) for each in allowed):
        raise EdgepruneError(f"{folder / name} links to {target}, outside its folder; put the file itself there")
