"""Results as a person reads them (terminal, Markdown, one HTML file) and as a program does (JSON)."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from edgeprune_runtime.machine import Machine

SCHEMA_VERSION = 1
Cell: TypeAlias = str | int | float | None

_BAR_WIDTH = 160
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .35rem .7rem; border-bottom: 1px solid #dde2ea; }
th { text-align: left; background: #f4f6f9; }
th.figure, td.figure { text-align: right; font-variant-numeric: tabular-nums; }
svg { vertical-align: middle; margin-left: .5rem; } .note { color: #5a6675; font-size: .9rem; }
.passed { color: #14713d; } .failed { color: #a8232c; } li { margin: .2rem 0; }
@media (max-width: 48rem) { table { display: block; overflow-x: auto; } th, td { padding: .35rem .4rem; } }
@media (prefers-color-scheme: dark) {
  body { background: #12161c; color: #dfe5ec; } th { background: #1d242d; } th, td { border-color: #2c3641; }
  .passed { color: #5fd08f; } .failed { color: #ff8289; } .note { color: #97a4b2; } }
"""


@dataclass(frozen=True)
class Table:
    """Rows under columns whose names carry the unit; `bars` names the columns that HTML shows as bars too."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bars: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.title!r} has a row that does not fit its {len(self.columns)} columns")


@dataclass(frozen=True)
class Verdict:
    """One sentence; `passed` is None where it neither passes nor fails anything."""

    text: str
    passed: bool | None = None


@dataclass(frozen=True)
class Report:
    """A titled set of tables with verdicts, the machine they were made on, and the raw `data` for programs."""

    title: str
    machine: Machine
    tables: tuple[Table, ...]
    verdicts: tuple[Verdict, ...] = ()
    data: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The report as plain values, ready for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "machine": self.machine.to_dict(),
            "tables": [
                {
                    "title": table.title,
                    "rows": [dict(zip(table.columns, row, strict=True)) for row in table.rows],
                    "notes": list(table.notes),
                }
                for table in self.tables
            ],
            "verdicts": [{"text": verdict.text, "passed": verdict.passed} for verdict in self.verdicts],
            "data": dict(self.data),
        }

    def to_markdown(self) -> str:
        """The report as GitHub Markdown."""
        lines = [f"# {_markdown(self.title)}", ""]
        for verdict in self.verdicts:
            lines.append(f"- {_mark(verdict)}{_markdown(verdict.text)}")
        for table in self.tables:
            lines += ["", f"## {_markdown(table.title)}", ""]
            lines.append(f"| {' | '.join(map(_markdown, table.columns))} |")
            lines.append(f"|{'|'.join('---:' if _is_figures(table, i) else '---' for i in range(len(table.columns)))}|")
            lines += [f"| {' | '.join(_markdown(format_cell(cell)) for cell in row)} |" for row in table.rows]
            lines += [line for note in table.notes for line in ("", _markdown(note))]
        lines += ["", f"Measured on {_markdown(describe_machine(self.machine))}.", ""]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The report as one HTML file that needs no other."""
        body = [f"<h1>{html.escape(self.title)}</h1>", "<ul>"]
        for verdict in self.verdicts:
            kind = {True: "passed", False: "failed", None: ""}[verdict.passed]
            body.append(f'<li class="{kind}">{html.escape(_mark(verdict) + verdict.text)}</li>')
        body.append("</ul>")
        body += [_html_table(table) for table in self.tables]
        body.append(f'<p class="note">Measured on {html.escape(describe_machine(self.machine))}.</p>')
        title = html.escape(self.title)
        content = "\n".join(body)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>\n'
            f"<body>\n{content}\n</body></html>\n"
        )

    def print(self, console: Console, *, with_machine: bool = True) -> None:
        """Show the report on a terminal."""
        for table in self.tables:
            console.print(f"\n[bold]{escape(table.title)}[/]", highlight=False)
            shown = RichTable(box=SIMPLE_HEAD, show_edge=False)
            for index, column in enumerate(table.columns):
                shown.add_column(
                    escape(column), justify="right" if _is_figures(table, index) else "left", overflow="fold"
                )
            for row in table.rows:
                shown.add_row(*(escape(format_cell(cell)) for cell in row))
            console.print(shown)
            for note in table.notes:
                console.print(escape(note), style="dim")
        if self.verdicts:
            console.print("\n[bold]Verdict[/]")
        for verdict in self.verdicts:
            style = {True: "green", False: "bold red", None: ""}[verdict.passed]
            console.print(escape(_mark(verdict) + verdict.text), style=style)
        if with_machine:
            console.print(escape(f"Measured on {describe_machine(self.machine)}."), style="dim")

    def save(self, folder: Path) -> None:
        """Write `report.json`, `report.md` and `report.html` into an existing folder."""
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
        (folder / "report.md").write_text(self.to_markdown(), "utf-8")
        (folder / "report.html").write_text(self.to_html(), "utf-8")


def format_cell(cell: Cell) -> str:
    """A cell as text: whole numbers with separators, others with four significant digits, nothing as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, bool | str):
        return str(cell)
    if isinstance(cell, int) or abs(cell) >= 1_000:
        return f"{cell:,.0f}"
    return f"{cell:.4g}"


def format_bytes(size: float) -> str:
    """A size for a sentence, such as `512 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def describe_machine(machine: Machine) -> str:
    """The machine in one sentence."""
    allowed = f"{len(machine.affinity)} of {machine.cores} cores" if machine.affinity else f"{machine.cores} cores"
    quota = f", quota {machine.cpu_quota:g}" if machine.cpu_quota else ""
    memory = f", {format_bytes(machine.memory_bytes)} memory" if machine.memory_bytes else ""
    return (
        f"{machine.cpu}, {allowed}{quota}{memory}, {machine.system}, Python {machine.python}, "
        f"ONNX Runtime {machine.onnxruntime}, edgeprune {machine.edgeprune}"
    )


def _html_table(table: Table) -> str:
    lines = [f"<h2>{html.escape(table.title)}</h2>", "<table>"]
    heads = (
        f"<th{' class=figure' if _is_figures(table, index) else ''}>{html.escape(column)}</th>"
        for index, column in enumerate(table.columns)
    )
    lines.append(f"<tr>{''.join(heads)}</tr>")
    tops = [_largest_figure([row[index] for row in table.rows]) for index in range(len(table.columns))]
    for row in table.rows:
        cells: list[str] = []
        for column, cell, top in zip(table.columns, row, tops, strict=True):
            is_figure = isinstance(cell, int | float) and not isinstance(cell, bool)
            bar = _bar(float(cell) / top) if is_figure and column in table.bars and top > 0 else ""  # type: ignore[arg-type]
            is_right = is_figure or (cell is None and _is_figures(table, len(cells)))
            cells.append(f"<td{' class=figure' if is_right else ''}>{html.escape(format_cell(cell))}{bar}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</table>")
    lines += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    return "\n".join(lines)


def _bar(share: float) -> str:
    width = max(0.0, min(1.0, share)) * _BAR_WIDTH
    return (
        f'<svg width="{_BAR_WIDTH}" height="10" role="img" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="10" rx="2" fill="#4a7fd6"/></svg>'
    )


def _largest_figure(cells: Sequence[Cell]) -> float:
    return max((float(cell) for cell in cells if isinstance(cell, int | float)), default=0.0)


def _is_figures(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.rows]
    return any(isinstance(cell, int | float) for cell in cells)


def _mark(verdict: Verdict) -> str:
    return {True: "✓ ", False: "✗ ", None: ""}[verdict.passed]


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
