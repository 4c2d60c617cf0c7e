"""Measurements on disk: one JSON line each, found again by everything that determines it.

A table of dozens of models takes hours, so it is made of many short runs: each finished measurement is appended at
once, and a run that finds it there does not repeat it. A line holds

    key       what determines the result: the model by its weights' hash, settings, calibration, task, number formats
    result    what came out, with parameters, seconds and the machine
    code      hash of the source that measured it; not part of the key, because most edits change no figure
"""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import edgeprune
import edgeprune_export
import edgeprune_runtime
from edgeprune_runtime.errors import EdgepruneError

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class Results:
    """The measurements of one file, which need not exist yet.

    Args:
        path: the JSON-lines file.
        code: only measurements of this code count; None for all.
    """

    def __init__(self, path: Path, code: str | None = None) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        if path.is_dir():
            raise EdgepruneError(f"{path} is a folder; --results expects a file such as {path / 'accuracy.jsonl'}")
        lines = path.read_text("utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if code in (None, record["code"]):
                    self._records[_text(record["key"])] = record
            except (ValueError, KeyError, TypeError):
                # A run that was killed while it wrote leaves such a line; the next one begins a new line behind it.
                logger.warning("%s line %d is no measurement and is passed over", path, number)

    def find(self, key: Mapping[str, Any]) -> Record | None:
        """The measurement of this key, the latest if there are several."""
        return self._records.get(_text(key))

    def add(self, key: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Append one measurement; it is on disk when this returns."""
        whole = {"key": dict(key), **record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # An empty line in front costs nothing, and keeps a line that was cut off before apart from this one.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(whole, allow_nan=False)}\n")
        self._records[_text(key)] = whole


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


@functools.cache
def code_hash() -> str:
    """Hash of the source that a figure depends on: the packages and the evaluation; 16 digits of it."""
    packages = [Path(str(package.__file__)).parent for package in (edgeprune, edgeprune_export, edgeprune_runtime)]
    files = [Path(__file__).with_name("evaluation.py"), *(file for each in packages for file in each.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in sorted(files):
        if "cli" not in file.relative_to(file.parents[1]).parts:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
