"""`PrunePlan`: the frozen record of a cut, made by allocation, read by shrink, checkpoint and reports (`plan.json`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import index
from pathlib import Path
from typing import Any, get_args

from edgeprune.groups import Side
from edgeprune_runtime.errors import EdgepruneError

PLAN_FILE = "plan.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CalibrationRecord:
    """Which tokens the statistics saw: where they came from, how many, and the SHA-256 of the int64 token array."""

    source: str
    sequences: int
    length_tokens: int
    sha256: str


@dataclass(frozen=True)
class SparsityRecord:
    """Which weights may be other than zero: `pattern` in each Linear of `sides`, along that side ("in" or "out")."""

    pattern: str
    method: str
    scope: str
    layout: str
    refit: str
    sides: Mapping[str, Side]

    def summary(self) -> dict[str, Any]:
        """The record without its long list of Linears."""
        return {key: value for key, value in asdict(self).items() if key != "sides"} | {"linears": len(self.sides)}


@dataclass(frozen=True)
class PrunePlan:
    """What stays of a model, and how that was decided.

    `keep` maps each group's name to the sorted indices of the units that stay (indices of the model before the cut),
    `units` to the number there were. Parameters count tied weights once. `ratio` is the share of all parameters
    removed.
    """

    model: str
    model_type: str
    method: str
    allocation: str
    refit: str
    ratio_asked: float
    ratio_reached: float
    parameters_before: int
    parameters_after: int
    block_parameters_before: int
    block_parameters_after: int
    align: int
    seed: int
    dtype: str
    calibration: CalibrationRecord | None
    edgeprune_version: str
    keep: Mapping[str, Sequence[int]]
    units: Mapping[str, int]
    notes: Sequence[str] = field(default_factory=tuple)
    heads: str = "auto"
    recover: str = "none"
    sparsity: SparsityRecord | None = None

    @property
    def is_cut(self) -> bool:
        """Whether anything leaves the model; if not, it only gets zeros."""
        return bool(self.keep)

    def to_json(self) -> str:
        """The plan as one JSON document."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "PrunePlan":
        """Read a plan back.

        Raises:
            EdgepruneError: if the text is not a plan of this version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise EdgepruneError(f"plan has schema_version {version!r}; this edgeprune reads {SCHEMA_VERSION}")
            calibration, sparsity = data.pop("calibration"), data.pop("sparsity", None)
            keep = {str(name): tuple(index(unit) for unit in units) for name, units in data.pop("keep").items()}
            units = {str(name): index(count) for name, count in data.pop("units").items()}
            notes = tuple(data.pop("notes"))
            if not all(isinstance(note, str) for note in notes):
                raise TypeError("a note is no text")
            plan = cls(
                **data,
                keep=keep,
                units=units,
                notes=notes,
                calibration=CalibrationRecord(**calibration) if calibration else None,
                sparsity=None if sparsity is None else SparsityRecord(**sparsity),
            )
            _check_types(plan)
            if plan.calibration:
                _check_types(plan.calibration)
            if plan.sparsity:
                _check_types(plan.sparsity)
                _check_sides(plan.sparsity)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise EdgepruneError(
                f"not an edgeprune plan ({error}); expected the plan.json that `compress` wrote"
            ) from None

    def summary(self) -> dict[str, Any]:
        """The plan without its long lists of units, for manifests and reports."""
        short = {key: value for key, value in asdict(self).items() if key not in ("keep", "units")}
        return short | {"sparsity": self.sparsity.summary() if self.sparsity else None}

    def save(self, folder: Path) -> None:
        """Write `plan.json` into an existing folder."""
        (folder / PLAN_FILE).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PrunePlan":
        """Read `plan.json` of a checkpoint folder.

        Raises:
            EdgepruneError: if there is none or it is damaged.
        """
        path = folder / PLAN_FILE
        if not path.is_file():
            raise EdgepruneError(f"{folder} has no {PLAN_FILE}; expected a folder written by `edgeprune compress`")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EdgepruneError(
                f"cannot read {path} ({error}); expected the plan.json that `compress` wrote"
            ) from error
        return cls.from_json(text)


def _check_sides(record: SparsityRecord) -> None:
    """Raise TypeError for sides that are none."""
    if not isinstance(record.sides, dict) or not all(side in get_args(Side) for side in record.sides.values()):
        raise TypeError("sides are not in or out")


def _check_types(record: PrunePlan | CalibrationRecord | SparsityRecord) -> None:
    """Raise TypeError for the first text or number that is none."""
    for spec in fields(record):
        value: object = getattr(record, spec.name)
        if spec.type is float:
            fits = isinstance(value, float) or type(value) is int
        else:
            fits = spec.type not in (str, int) or type(value) is spec.type
        if not fits:
            raise TypeError(f"{spec.name} is {value!r:.80}")
