"""The table of architectures in the README: every row says what the plug-in file says, every tick has its test."""

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import toys

from edgeprune.configs import architecture, known_types

ROOT = Path(__file__).parents[1]
HEADER = ("`model_type`", "models", "prune", "reload", "`--widths uniform`", "ONNX", "run")
TICK = "✓"
STEPS = {
    # column -> the tests that have a case for every type which has a tick there
    "prune": [("compress/test_shrink.py", "test_cut_equals_silenced")],
    "reload": [
        ("compress/test_checkpoint.py", "test_per_layer_reload_equals_the_cut"),
        ("cli/test_every_type.py", "test_from_weights_to_text"),
    ],
    "ONNX": [("cli/test_every_type.py", "test_from_weights_to_text")],
    "run": [("cli/test_every_type.py", "test_from_weights_to_text")],
}
OWN_FORM_TESTS = {
    "prune": ("compress/test_baichuan.py", "test_cut_equals_silenced"),
    "reload": ("compress/test_baichuan.py", "test_compress_makes_a_pruned_llama_of_it"),
    "ONNX": ("compress/test_baichuan.py", "test_whole_job"),
    "run": ("compress/test_baichuan.py", "test_export_converts_it_first"),
}
UNIFORM = {("heads", "kv_heads", "channels"): TICK, ("channels",): "channels", (): "-"}
"""`STOCK` of an architecture file -> what the table says of it."""


def table() -> dict[str, dict[str, str]]:
    """`model_type` -> column -> cell."""
    rows = _rows()
    assert next(rows) == HEADER, "the table of architectures has other columns"
    next(rows)
    return {row[0].strip("`"): dict(zip(HEADER, row, strict=True)) for row in rows}


def _rows() -> Iterator[tuple[str, ...]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("### Architectures\n", 1)[1]
    lines = re.search(r"(^\|.*\n)+", text, flags=re.MULTILINE)
    assert lines is not None, "the section Architectures has no table"
    for line in lines.group().splitlines():
        yield tuple(cell.strip() for cell in line.strip("|").split("|"))


def stock_type(name: str) -> str:
    return str(getattr(architecture(name), "BECOMES", name))


@cache
def types_with_cases(file: str, function: str) -> frozenset[str]:
    """Types that a test has cases for, read off its marks; all, if it has no cases by name."""
    path = ROOT / "tests" / file
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    marks = getattr(getattr(module, function), "pytestmark", [])
    names = [mark.args[1] for mark in marks if mark.name == "parametrize" and mark.args[0] == "name"]
    return frozenset(name.split("-")[0] for each in names for name in each) or frozenset(known_types())


def test_every_architecture_file_has_a_row() -> None:
    assert sorted(table()) == sorted(known_types())


@pytest.mark.parametrize("name", known_types())
def test_a_row_says_what_the_file_says(name: str) -> None:
    row, family = table()[name], architecture(stock_type(name))
    assert row["ONNX"] == f"{TICK} {family.SOURCE}"
    assert row["`--widths uniform`"] == UNIFORM[tuple(family.STOCK)]
    assert (f"as `{stock_type(name)}`" in row["models"]) == (stock_type(name) != name)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", known_types())
def test_every_tick_has_its_test(name: str, step: str) -> None:
    assert table()[name][step].startswith(TICK)
    tests = [OWN_FORM_TESTS[step]] if stock_type(name) != name else STEPS[step]
    for file, function in tests:
        assert name in types_with_cases(file, function), f"{function} of {file} has no case for {name}"


def test_a_toy_is_named_after_its_type() -> None:
    """`types_with_cases` relies on it."""
    assert {name.split("-")[0] for name in toys.NAMES} <= set(known_types())
