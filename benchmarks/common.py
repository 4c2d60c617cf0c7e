"""What the benchmark scripts share: their arguments, texts, dense models, and the form of their output.

A script's `main` returns a `Report`; `run` prints it as Markdown tables and ends standard output with the same as one
JSON document. Progress goes to standard error.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune_runtime.errors import EdgepruneError
from edgeprune_runtime.report import Report

if TYPE_CHECKING:
    from edgeprune.sources import Source

MODEL = "smollm2-135m"
OUT = Path(__file__).parent / "out"
"""Where scripts put the checkpoints and bundles that they make, unless told otherwise; git ignores it."""

DATA_VARIABLE = "EDGEPRUNE_TEST_DATA"
CALIBRATION = "text/calib_c4.jsonl"
LAMBADA = "text/lambada.jsonl"
CHOICES = {
    "arc_easy": "tasks/arc_easy.jsonl",
    "piqa": "tasks/piqa.jsonl",
    "hellaswag": "tasks/hellaswag_first1000.jsonl",
}
WIKITEXT2 = {"valid": "text/wikitext2_valid.txt", "test": "text/wikitext2_test.txt"}


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as its help."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--data`."""
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get(DATA_VARIABLE, "data")),
        help=f"folder of texts, see benchmarks/README.md (default: ${DATA_VARIABLE}, else data/)",
    )


def data_file(folder: Path, name: str) -> Path:
    """A file of the data folder.

    Raises:
        EdgepruneError: if it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise EdgepruneError(
            f"{path} is missing; lay the texts out as benchmarks/README.md says, and name their folder "
            f"with --data or {DATA_VARIABLE}"
        )
    return path


def save_dense(model_name: str, folder: Path) -> "Source":
    """Save a dense model as a checkpoint folder, as `edgeprune compress` does, and return where it came from.

    Raises:
        EdgepruneError: if there is no such model, or something else stands at `folder`.
    """
    from edgeprune.checkpoint import save
    from edgeprune.groups import layer_widths
    from edgeprune.pruning import model_groups
    from edgeprune.sources import load, load_tokenizer, open_source

    source = open_source(model_name)
    model = load(source)
    save(model, load_tokenizer(source), None, layer_widths(model_groups(model), {}), folder, force=True)
    return source


def run(main: Callable[[], Report]) -> None:
    """Run a script: its report on standard output, a mistake of the user as one line and exit code 2."""
    try:
        report = main()
    except EdgepruneError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(report.to_markdown())
    print(json.dumps(report.to_dict(), allow_nan=False))
