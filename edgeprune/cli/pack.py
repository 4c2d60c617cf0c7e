"""`edgeprune pack`: a copy of a variant whose weights this machine maps as they are, and what that saves."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import app
from edgeprune.cli.device import AsJson, Quiet, Threads, Variant, show_report
from edgeprune.cli.extras import need
from edgeprune.cli.hints import PROMPT, say_next

if TYPE_CHECKING:
    from edgeprune_export.packing import Load
    from edgeprune_runtime.bundle import Bundle
    from edgeprune_runtime.packed import PackedCopy
    from edgeprune_runtime.report import Report


@app.command(rich_help_panel="On the device")
def pack(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.", show_default=False)],
    variant: Variant = None,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh processes that load each, to show what it saves.")] = 3,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a variant load with less memory, for disk: keep its weights packed for this CPU in BUNDLE/packed.

    On this machine run, bench, validate and eval then take the copy; nothing else does. To undo it, delete the folder.
    Exit code 1, and no copy, if it does not compute the very same logits.
    """
    need("pack", "onnx", "onnx_ir")
    from rich.console import Console

    from edgeprune_export.packing import compare_loads
    from edgeprune_export.packing import pack as write_packed
    from edgeprune_runtime.bundle import open_bundle

    bundle = open_bundle(folder, variant)
    with Console(stderr=True, quiet=quiet).status("packing") as status:
        copy = write_packed(bundle, say=status.update)
        status.update("measuring")
        plain, packed = compare_loads(bundle, rounds=rounds, threads=threads)
    if not quiet:
        typer.echo(f"wrote {copy.folder}, which this machine now runs {bundle.variant_name} from", err=True)
        say_next(("run", folder, "--variant", bundle.variant_name, *PROMPT))
    show_report(_report(bundle, copy, plain, packed, rounds), as_json=as_json, quiet=quiet)


def _report(bundle: "Bundle", copy: "PackedCopy", plain: "Load", packed: "Load", rounds: int) -> "Report":
    from dataclasses import asdict

    from edgeprune_runtime.machine import this_machine
    from edgeprune_runtime.report import Report, Table, Verdict, format_bytes

    size_bytes = bundle.size_bytes
    before, after = ({**asdict(each), "peak_times_size": each.times(size_bytes)} for each in (plain, packed))
    rows = [("size_bytes", size_bytes, copy.size_bytes), *((name, before[name], after[name]) for name in before)]
    notes = (
        f"Of {rounds} fresh processes each, in turns: the median time, the most memory. Peak is what is resident until "
        "the session is ready, pages of the mapped file included, before is Python with ONNX Runtime; own is memory "
        "that the system cannot take back, once the session is ready. Times size: (peak - before) / size of the own "
        "graph.",
    )
    table = Table(
        f"{bundle.path}, variant {bundle.variant_name}",
        ("figure", "own graph", "packed copy"),
        tuple(rows),
        notes=notes,
    )
    verdicts = [Verdict("the packed copy computes the golden sequences bit for bit as the variant's own graph", True)]
    if plain.peak_rss_bytes and packed.peak_rss_bytes:
        saved = format_bytes(abs(plain.peak_rss_bytes - packed.peak_rss_bytes))
        less = "less" if packed.peak_rss_bytes <= plain.peak_rss_bytes else "more"
        text = f"loading takes {saved} {less} at its peak, for {format_bytes(copy.size_bytes)} more on disk"
        verdicts.append(Verdict(text))
    data = {
        "bundle": str(bundle.path),
        "variant": bundle.variant_name,
        "folder": str(copy.folder),
        "own_graph": {"size_bytes": size_bytes, **before},
        "packed_copy": {"size_bytes": copy.size_bytes, **after},
    }
    return Report("edgeprune pack", this_machine(), (table,), tuple(verdicts), {"pack": data})
