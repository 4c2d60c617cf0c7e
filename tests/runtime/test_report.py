"""A report says the same in JSON, Markdown, HTML and on a terminal, and escapes what it is given."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Report, Table, Verdict, format_bytes, format_cell

HOSTILE = "a|b <script>alert(1)</script> [red]x[/red]"


@pytest.fixture
def report() -> Report:
    table = Table(
        "Sizes", ("what", "size_bytes", "tpot_ms"), ((HOSTILE, 123456, 1.23456), ("b", 61728, None)), ("size_bytes",)
    )
    return Report("Title <&>", this_machine(), (table,), (Verdict("good", True), Verdict("bad", False), Verdict("so")))


def test_json_holds_raw_figures(report: Report) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["tables"][0]["rows"][0] == {"what": HOSTILE, "size_bytes": 123456, "tpot_ms": 1.23456}
    assert document["machine"]["onnxruntime"] == this_machine().onnxruntime
    assert [verdict["passed"] for verdict in document["verdicts"]] == [True, False, None]


def test_markdown_keeps_its_columns(report: Report) -> None:
    lines = report.to_markdown().splitlines()
    row = next(line for line in lines if line.startswith("| a"))
    assert row == "| a\\|b &lt;script>alert(1)&lt;/script> [red]x[/red] | 123,456 | 1.235 |"
    assert "|---|---:|---:|" in lines
    assert "- ✗ bad" in lines


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href")]


def test_html_is_one_safe_file_with_bars(report: Report) -> None:
    parser = _Tags()
    parser.feed(report.to_html())
    assert "script" not in parser.tags
    assert parser.links == []
    assert parser.tags.count("svg") == 2
    assert 'rect width="80.0"' in report.to_html()


def test_a_missing_figure_stands_under_the_others(report: Report) -> None:
    assert "<td class=figure>–</td>" in report.to_html()


def test_terminal_shows_markup_as_text(report: Report) -> None:
    console = Console(file=io.StringIO(), width=200)
    report.print(console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]x[/red]" in shown
    assert "✗ bad" in shown


def test_save_writes_all_three(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}


def test_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Table("t", ("a", "b"), (("x",),))


@pytest.mark.parametrize(
    ("cell", "text"), [(None, "–"), (1234567, "1,234,567"), (0.000123456, "0.0001235"), (98765.4, "98,765"), ("x", "x")]
)
def test_cells_are_readable(cell: str | float | None, text: str) -> None:
    assert format_cell(cell) == text


def test_bytes_are_readable() -> None:
    assert [format_bytes(size) for size in (512, 512 << 20, 3 << 29)] == ["512 bytes", "512 MiB", "1.5 GiB"]
