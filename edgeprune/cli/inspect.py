"""`edgeprune inspect`: what a model is and what can be pruned of it, from its config alone."""

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import app
from edgeprune.cli.extras import need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from edgeprune.groups import LayerWidths
    from edgeprune.inspecting import Inspection

BAR_WIDTH = 24


@app.command(rich_help_panel="On the workstation")
def inspect(
    model: Annotated[
        str, typer.Argument(help="A model folder, a .gguf file, a hub id, or smollm2-135m.", show_default=False)
    ],
    align: Annotated[int, typer.Option(help="As for compress: kept channel counts are multiples of this.")] = 32,
    min_channels: Annotated[int, typer.Option(help="As for compress: channels that every MLP keeps.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Say what a model is and how far it can be pruned; reads its config, no weights. Exit code 2 if it cannot be."""
    need("compress", "torch", "transformers", "safetensors")
    from edgeprune.inspecting import inspect as look_at
    from edgeprune.sources import describe

    found = look_at(describe(model), align=align, min_channels=min_channels)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    _show(found)


def _show(found: "Inspection") -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    read_as = f", read as {found.model_type}" if found.stored_type != found.model_type else ""
    console.print(f"[bold]{escape(found.model)}[/]: {escape(found.stored_type)}{escape(read_as)}")
    console.print(f"[dim]from {escape(found.place)}; no weights were read[/]\n")
    console.print(_facts(found))
    console.print()
    console.print(_parameters(found))
    if len(set(found.layers)) > 1:
        console.print()
        console.print(_layers(found.layers))
    for line in found.refused:
        console.print(f"[yellow]not possible[/] {escape(line)}")


def _facts(found: "Inspection") -> "Table":
    whole = found.layers[0]
    alike = len(set(found.layers)) == 1

    def span(values: "Sequence[int]") -> str:
        low, high = min(values), max(values)
        return f"{low:,}" if low == high else f"{low:,} to {high:,}"

    table = _table("", "")
    layers = found.layers
    rows = {
        "layers": f"{len(layers)}" + ("" if alike else f", of {len(set(layers))} different widths"),
        "query heads": span([layer.heads for layer in layers]),
        "KV heads": span([layer.kv_heads for layer in layers]),
        "head_dim": f"{whole.head_dim}",
        "channels (MLP)": span([layer.channels for layer in layers]),
        "hidden_size": f"{found.hidden_size:,}",
        "vocabulary": f"{found.vocab_size:,}" + (", head tied to the embedding" if found.is_tied else ""),
        "context": "-" if found.context_tokens is None else f"{found.context_tokens:,} tokens",
        "ONNX graph": found.graph_source,
        "loads as it is": "in stock transformers" if found.is_stock else "edgeprune.load_pruned, or trust_remote_code",
        "--widths uniform": _uniform(found),
        "prunable": "KV heads, query heads and MLP channels: "
        f"{found.prunable_parameters / found.parameters['all']:.1%} of all parameters",
        # rounded down, so that it can be asked for
        "--ratio up to": f"{math.floor(1000 * found.largest_ratio) / 1000:.3f} with --allocation uniform: "
        f"each block keeps {found.smallest.heads} of its query heads, {found.smallest.kv_heads} of its KV heads and "
        f"{found.smallest.channels:,} of its channels",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _uniform(found: "Inspection") -> str:
    if not found.head_counts:
        return "no"
    if len(found.head_counts) == 1:
        return "yes, heads stay whole"
    shown = ", ".join(f"{heads}/{kv_heads}" for heads, kv_heads in found.head_counts[:6])
    more = " ..." if len(found.head_counts) > 6 else ""
    return f"yes, with query/KV heads {shown}{more}"


def _parameters(found: "Inspection") -> "Table":
    total = found.parameters["all"]
    table = _table("parameters", "", "share", "", figures=(1, 2))
    for part, count in found.parameters.items():
        if count:
            bar = "" if part == "all" else _bar(count, total)
            table.add_row(part, f"{count:,}", f"{count / total:.1%}", bar)
    return table


def _layers(layers: "Sequence[LayerWidths]") -> "Table":
    most_heads = max(layer.heads for layer in layers)
    most_channels = max(layer.channels for layer in layers)
    table = _table("layer", "heads/KV", "", "channels", "", figures=(0, 1, 3))
    for number, layer in enumerate(layers):
        table.add_row(
            f"{number}",
            f"{layer.heads}/{layer.kv_heads}",
            _bar(layer.heads, most_heads, BAR_WIDTH // 2),
            f"{layer.channels:,}",
            _bar(layer.channels, most_channels),
        )
    return table


def _bar(value: int, most: int, width: int = BAR_WIDTH) -> str:
    return "█" * max(1, round(width * value / most))


def _table(*columns: str, figures: tuple[int, ...] = ()) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    has_header = any(columns)
    table = Table(box=SIMPLE_HEAD if has_header else None, show_edge=False, show_header=has_header, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in figures else "left", overflow="fold")
    return table
