"""Texts are joined as the papers do, and the joining is named."""

from pathlib import Path

import pytest

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.text import ROWS_JOINED, WHOLE, read_text

RAW = " \n = Title = \n \n First . \n Second . \n"


def test_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(RAW)
    text = read_text(path)
    assert (text.text, text.joining, len(text.text_hash)) == (RAW, WHOLE, 64)


def test_lines_as_rows_keep_their_newline_and_empty_ones_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(RAW)
    text = read_text(path, rows_joined=True)
    rows = ["", " = Title = \n", "", " First . \n", " Second . \n"]
    assert text.text == "\n\n".join(rows)
    assert text.joining == ROWS_JOINED


def test_jsonl_rows_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n')
    text = read_text(path)
    assert (text.text, text.joining) == ("a\u2028b\n\nc", ROWS_JOINED)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b" \n", "no text"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b \\ud800 c"}', r"line 2 holds '\\ud800', which is no character"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}', 'line 2 has no string "text"'),
        ("a.jsonl", b"[1]", 'no string "text"'),
    ],
)
def test_unreadable_text_is_one_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EdgepruneError, match=message):
        read_text(tmp_path / name)


def test_missing_text_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match="cannot read the text"):
        read_text(tmp_path / "absent.txt")
