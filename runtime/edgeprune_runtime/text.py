"""Reading texts for evaluation and calibration, with a name for the way their rows were joined.

A perplexity means something only with that name: GPTQ, SparseGPT and Wanda join WikiText's rows by a blank line,
llama.cpp takes the file as it is, and the two differ.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune_runtime.errors import EdgepruneError

WHOLE = "whole file"
ROWS_JOINED = 'rows joined by "\\n\\n"'
_ROW_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text, the way it was made from its rows, and the SHA-256 of its UTF-8 bytes."""

    text: str
    joining: str
    text_hash: str
    source: str


def read_text(path: Path, *, rows_joined: bool = False) -> Text:
    r"""The text of a file: `.jsonl` rows with a "text" field joined by a blank line, anything else whole.

    With `rows_joined` the lines of a plain file count as rows, as the data set's rows are made from WikiText's raw
    file: a row keeps its newline, an empty line is an empty row, and rows are joined by "\n\n".

    Raises:
        EdgepruneError: if the file cannot be read, is not UTF-8, is empty, or a jsonl row has no proper "text".
    """
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise EdgepruneError(f"cannot read the text {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise EdgepruneError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    if path.suffix == ".jsonl":
        text, joining = _ROW_SEPARATOR.join(jsonl_rows(content, path)), ROWS_JOINED
    elif rows_joined:
        text, joining = _ROW_SEPARATOR.join(line_rows(content)), ROWS_JOINED
    else:
        text, joining = content, WHOLE
    if not text.strip():
        raise EdgepruneError(f"{path} holds no text")
    return Text(text, joining, hashlib.sha256(text.encode()).hexdigest(), str(path))


def jsonl_rows(content: str, path: Path) -> Sequence[str]:
    """The "text" of each line of a jsonl file's content; `path` names it in errors.

    Raises:
        EdgepruneError: naming the first line that is not an object with a string "text", in proper Unicode.
    """
    rows = []
    # Not splitlines(): JSON strings may hold the other characters at which it breaks, such as U+2028.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EdgepruneError(
                f'{path} line {number} is not JSON ({error}); one object {{"text": ...}} was expected'
            ) from error
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise EdgepruneError(f'{path} line {number} has no string "text"; one object {{"text": ...}} was expected')
        check_unicode(text, f"{path} line {number}")
        rows.append(text)
    return rows


def check_unicode(text: str, where: str) -> None:
    """Check that a text holds no half of a surrogate pair: JSON escapes can, and arguments that are not UTF-8.

    Raises:
        EdgepruneError: if it does; `where` says what the text is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EdgepruneError(
            f"{where} holds {text[error.start]!a}, which is no character; proper Unicode was expected, give it as UTF-8"
        ) from error


def line_rows(content: str) -> Sequence[str]:
    """The lines of a raw file as data-set rows: each with its newline, and "" for a line of nothing but spaces."""
    *lines, last = content.split("\n")
    rows = [f"{line}\n" if line.strip() else "" for line in lines]
    return [*rows, last] if last.strip() else rows
