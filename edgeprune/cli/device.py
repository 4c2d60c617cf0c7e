"""Commands that run on the device, with only the base install: run, validate, eval, bench.

Results go to stdout, progress and remarks to stderr. With `--json` stdout has one JSON document, stderr all else.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import app
from edgeprune.cli.options import DEFAULT_WINDOW
from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.limits import MAX_THREADS
from edgeprune_runtime.output import Kind

if TYPE_CHECKING:
    from edgeprune_runtime.bundle import Bundle
    from edgeprune_runtime.report import Report

REPORT = Kind("an earlier report", ("report.json",), frozenset({"report.json", "report.md", "report.html"}))

BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle, or a .ort file in one.", show_default=False)
]
Variant = Annotated[str | None, typer.Option(help="Which of the bundle's graphs; default: the manifest's.")]
Provider = Annotated[str, typer.Option(help="Execution provider of ONNX Runtime: cpu, cuda, coreml, webgpu, qnn ...")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_THREADS, help="Threads; default: what affinity and container quota allow.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")]


@app.command(rich_help_panel="On the device")
def run(
    folder: BundleFolder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt; - reads standard input.")],
    system: Annotated[str | None, typer.Option(help="System message of the chat template.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that reach this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    provider: Provider = "cpu",
    variant: Variant = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate text with a bundle; it streams as it comes."""
    import time

    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.generate import Generation, Sampling
    from edgeprune_runtime.session import Decoder, check_context
    from edgeprune_runtime.text import check_unicode
    from edgeprune_runtime.tokenizer import Tokenizer, stream_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    bundle = open_bundle(folder, variant)
    tokenizer = Tokenizer.load(bundle)
    text = _read_input() if prompt == "-" else prompt
    check_unicode(text, "the prompt")
    check_unicode(system or "", "the system message")
    if raw or tokenizer.chat_template is None:
        if system is not None:
            reason = "--raw takes none" if raw else "this bundle has no chat template"
            raise EdgepruneError(f"a system message was given, but {reason}; put it into the prompt")
        ids = tokenizer.encode(text)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        ids = tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
    check_context(bundle.manifest, len(ids))
    _say_packed(bundle, provider, quiet)
    decoder = Decoder(bundle, provider=provider, threads=threads)
    generation = Generation(decoder, ids, max_new_tokens=max_new_tokens, sampling=sampling)

    arrivals = [time.perf_counter()]
    tokens: list[int] = []

    def timed() -> Iterator[int]:
        for token in generation:
            arrivals.append(time.perf_counter())
            tokens.append(token)
            yield token

    pieces = []
    is_shown = not (as_json and quiet)
    for piece in stream_text(tokenizer, timed()):
        pieces.append(piece)
        if is_shown:
            typer.echo(piece, nl=False, err=as_json)
    if is_shown:
        typer.echo(err=as_json)
    steps = [(after - before) * 1e3 for before, after in itertools.pairwise(arrivals)]
    ttft_ms = steps[0] if steps else None
    tpot_ms = sum(steps[1:]) / len(steps[1:]) if len(steps) > 1 else None
    if not quiet:
        first = f", first token after {ttft_ms:.0f} ms" if ttft_ms is not None else ""
        rest = f", then {tpot_ms:.1f} ms each" if tpot_ms is not None else ""
        typer.echo(
            f"{len(ids)} prompt tokens, {len(tokens)} generated{first}{rest}, ended by {generation.stop_reason}",
            err=True,
        )
    if as_json:
        _print_json(
            {
                "text": "".join(pieces),
                "tokens": tokens,
                "prompt_tokens": len(ids),
                "stop_reason": generation.stop_reason,
                "ttft_ms": ttft_ms,
                "tpot_mean_ms": tpot_ms,
                "provider": provider,
                "threads": decoder.threads,
                "variant": bundle.variant_name,
                "is_packed": decoder.packed is not None,
            }
        )


@app.command(rich_help_panel="On the device")
def validate(
    folder: BundleFolder,
    provider: Provider = "cpu",
    variant: Variant = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check, without torch, that a bundle computes what its model computed. Exit code 1 if it does not."""
    from edgeprune_runtime import validate as validation
    from edgeprune_runtime.bundle import open_bundle

    bundle = open_bundle(folder, variant)
    _say_packed(bundle, provider, quiet)
    with _status("validating", quiet) as update:
        result = validation.validate(
            bundle, provider=provider, threads=threads, on_check=lambda check: update(f"checked {check.name}")
        )
    show_report(validation.report_validation(result), as_json=as_json, quiet=quiet)
    result.ensure_passed()


@app.command("eval", rich_help_panel="On the device")
def evaluate(
    folder: BundleFolder,
    text: Annotated[Path, typer.Option(help="A text file, or .jsonl rows with a text field.", show_default=False)],
    window: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of a window; default: {DEFAULT_WINDOW}, or the model's context.", show_default=False
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between windows; default: the window, so none overlap.", show_default=False),
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.", show_default=False)] = None,
    rows_joined: Annotated[
        bool, typer.Option("--rows-joined", help="Lines of the file are rows, joined by a blank line as GPTQ does.")
    ] = False,
    provider: Provider = "cpu",
    variant: Variant = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of a text through ONNX Runtime."""
    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.perplexity import measure_perplexity, report_perplexity
    from edgeprune_runtime.session import Decoder
    from edgeprune_runtime.text import read_text
    from edgeprune_runtime.tokenizer import Tokenizer

    bundle = open_bundle(folder, variant)
    tokenizer = Tokenizer.load(bundle)
    source = read_text(text, rows_joined=rows_joined)
    _say_packed(bundle, provider, quiet)
    window = min(DEFAULT_WINDOW, bundle.manifest.context_tokens) if window is None else window
    decoder = Decoder(bundle, provider=provider, threads=threads, tokens=window)
    with _progress("windows", quiet) as advance:
        result = measure_perplexity(
            decoder,
            tokenizer.encode(source.text),
            window=window,
            stride=stride,
            max_windows=max_windows,
            text_hash=source.text_hash,
            joining=source.joining,
            progress=advance,
        )
    report = report_perplexity(result, bundle=str(folder), variant=bundle.variant_name, source=source.source)
    show_report(report, as_json=as_json, quiet=quiet)


@app.command(rich_help_panel="On the device")
def bench(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a bundle.", show_default=False)],
    b: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="A second bundle, compared with the first.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Fresh processes per bundle.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    generate_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    memory: Annotated[
        str | None, typer.Option(help="Memory each process may use, such as 512MiB; enforced.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New folder for report.json, .md and .html.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report folder.")] = False,
    provider: Provider = "cpu",
    variant: Variant = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, throughput and memory of a bundle, or of two in turns, on this machine."""
    from edgeprune_runtime import bench as benchmark
    from edgeprune_runtime.bundle import open_bundle
    from edgeprune_runtime.limits import parse_size
    from edgeprune_runtime.output import check_apart, check_output

    folders = [a] if b is None else [a, b]
    if output is not None:
        check_apart(output, *folders)
        check_output(output, force=force, kind=REPORT)
    memory_bytes = parse_size(memory) if memory is not None else None
    for folder in folders:
        _say_packed(open_bundle(folder, variant), provider, quiet)
    with _progress("rounds", quiet) as advance:
        result = benchmark.bench(
            folders,
            variant=variant,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            rounds=rounds,
            threads=threads,
            memory_bytes=memory_bytes,
            provider=provider,
            progress=advance,
        )
    report = benchmark.report_bench(result)
    if output is not None:
        _save_report(report, output, force=force)
    show_report(report, as_json=as_json, quiet=quiet)


def _read_input() -> str:
    """The text on standard input."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise EdgepruneError(f"standard input is not text ({error}); convert it to UTF-8 first") from error


def _say_packed(bundle: "Bundle", provider: str, quiet: bool) -> None:
    """Whether the variant's packed copy is run, if it has one."""
    from edgeprune_runtime.packed import find_packed

    packed = find_packed(bundle, provider)
    if packed is not None and not quiet:
        typer.echo(packed.sentence(bundle.variant_name), err=True)


def show_report(report: "Report", *, as_json: bool, quiet: bool) -> None:
    """A report as tables on stdout; with --json as one document there, and as tables on stderr."""
    from rich.console import Console

    report.print(Console(stderr=as_json, quiet=as_json and quiet))
    if as_json:
        _print_json(report.to_dict())


def _print_json(document: Mapping[str, object]) -> None:
    typer.echo(json.dumps(document, allow_nan=False))


def _save_report(report: "Report", folder: Path, *, force: bool) -> None:
    from edgeprune_runtime.output import atomic_folder

    with atomic_folder(folder, force=force, kind=REPORT) as part:
        report.save(part)


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, as a function of (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _status(what: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what was done last."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    with console.status(what) as status:
        yield status.update
