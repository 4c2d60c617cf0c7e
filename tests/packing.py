"""Packed copies of tiny bundles, for the tests of both sides."""

import json
from pathlib import Path
from typing import Any

import onnx

from edgeprune_export.packing import PREPACKED
from edgeprune_runtime import packed
from edgeprune_runtime.packed import RECORD_FILE


def packed_offsets(graph: Path) -> list[int]:
    """Where the packed weights of a graph begin in its external data."""
    model = onnx.load(graph, load_external_data=False)
    entries = [entry for weight in model.graph.initializer for entry in weight.external_data]
    blobs = [blob for entry in entries if entry.key.startswith(PREPACKED) for blob in entry.value.split("|")[1:]]
    return [int(blob.split(";")[0]) for blob in blobs]


def edit_record(folder: Path, *, is_sealed: bool, **changes: Any) -> None:
    """Overwrite fields of a copy's record, with a new seal as only its owner can make it, or the old one."""
    path = folder / RECORD_FILE
    record = json.loads(path.read_text()) | changes
    if is_sealed:
        key = packed._key()
        assert key is not None
        record["seal"] = packed._seal(record, key)
    path.write_text(json.dumps(record))
