import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.plan import CalibrationRecord, PrunePlan, SparsityRecord
from edgeprune_runtime.errors import EdgepruneError

PLAN = PrunePlan(
    model="a model",
    model_type="llama",
    method="wanda-sp",
    allocation="global",
    refit="least-squares",
    ratio_asked=0.2,
    ratio_reached=0.1997,
    parameters_before=1000,
    parameters_after=800,
    block_parameters_before=700,
    block_parameters_after=500,
    align=32,
    seed=1,
    dtype="float32",
    calibration=CalibrationRecord("self", 8, 128, "ab" * 32),
    edgeprune_version="0.1.0",
    keep={"layers.0.heads": (0, 2, 5)},
    units={"layers.0.heads": 6},
    notes=("a note",),
)

ZEROS = SparsityRecord("2:4", "dass", "mlp", "paper", "none", {"layers.0.up_proj": "out", "layers.0.down_proj": "in"})


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.lists(st.integers(0, 10**6)).map(tuple)), st.text(), st.none() | st.text())
def test_round_trip(keep: dict[str, tuple[int, ...]], text: str, source: str | None) -> None:
    calibration = None if source is None else CalibrationRecord(source, 1, 2, "")
    plan = dataclasses.replace(PLAN, keep=keep, model=text, notes=(text,), calibration=calibration)
    assert PrunePlan.from_json(plan.to_json()) == plan


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), st.sampled_from(["in", "out"])), st.text())
def test_round_trip_with_zeros(sides: dict[str, Any], text: str) -> None:
    plan = dataclasses.replace(PLAN, sparsity=dataclasses.replace(ZEROS, sides=sides, method=text))
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_round_trip_by_file(tmp_path: Path) -> None:
    for plan in (PLAN, dataclasses.replace(PLAN, sparsity=ZEROS), dataclasses.replace(PLAN, keep={}, sparsity=ZEROS)):
        plan.save(tmp_path)
        assert PrunePlan.load(tmp_path) == plan


def test_plan_of_an_older_version_knows_no_zeros() -> None:
    assert PrunePlan.from_json(without("sparsity")) == PLAN
    assert PLAN.sparsity is None


def test_plan_that_keeps_everything_cuts_nothing() -> None:
    assert PLAN.is_cut
    assert not dataclasses.replace(PLAN, keep={}).is_cut


def test_summary_counts_what_it_does_not_list() -> None:
    summary = dataclasses.replace(PLAN, sparsity=ZEROS).summary()
    assert {"keep", "units"}.isdisjoint(summary)
    assert summary["sparsity"] == {
        "pattern": "2:4",
        "method": "dass",
        "scope": "mlp",
        "layout": "paper",
        "refit": "none",
        "linears": 2,
    }
    assert PLAN.summary()["sparsity"] is None


def test_a_folder_without_plan(tmp_path: Path) -> None:
    with pytest.raises(EdgepruneError, match=r"has no plan\.json"):
        PrunePlan.load(tmp_path)


def test_a_plan_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(EdgepruneError, match=r"cannot read .*plan\.json"):
        PrunePlan.load(tmp_path)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | changes)


def zeros(**changes: Any) -> str:
    return changed(sparsity=dataclasses.asdict(ZEROS) | changes)


def without(key: str) -> str:
    return json.dumps({name: value for name, value in json.loads(PLAN.to_json()).items() if name != key})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{}",
        '{"schema_version": 1}',
        "[" * 100_000,
        changed(schema_version=2),
        changed(surprise=1),
        changed(keep=[1, 2]),
        changed(keep={"layers.0.heads": 3}),
        changed(keep={"layers.0.heads": ["a"]}),
        changed(keep={"layers.0.heads": [None]}),
        changed(calibration={"source": "x"}),
        changed(calibration=["x"]),
        changed(notes=3),
        changed(notes=[3]),
        changed(model=5),
        changed(align="32"),
        changed(seed=True),
        changed(seed=1.5),
        changed(ratio_asked="0.2"),
        changed(units=3),
        changed(units={"layers.0.heads": "6"}),
        changed(keep={"layers.0.heads": [1.5]}),
        changed(calibration={"source": 1, "sequences": 8, "length_tokens": 128, "sha256": ""}),
        changed(sparsity=7),
        changed(sparsity="2:4"),
        changed(sparsity=["2:4"]),
        changed(sparsity={"pattern": "2:4"}),
        zeros(surprise=1),
        zeros(sides=None),
        zeros(sides=["layers.0.up_proj"]),
        zeros(sides={"layers.0.up_proj": "up"}),
        zeros(sides={"layers.0.up_proj": 1}),
        zeros(sides={"layers.0.up_proj": ["in"]}),
        zeros(pattern=2),
        zeros(pattern=None),
        zeros(method=["dass"]),
        zeros(scope=True),
        zeros(refit=None),
        without("keep"),
        without("model"),
        without("notes"),
    ],
)  # fmt: skip
def test_hostile_plan(text: str) -> None:
    with pytest.raises(EdgepruneError, match="plan"):
        PrunePlan.from_json(text)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.seed = 2  # type: ignore[misc]  # the assignment is what is tested
