"""The rows of the accuracy table: what others do, as their papers and official code do it, and what we do.

A recipe is written NAME=METHOD|ALLOCATION|REFIT|HEADS|RECOVER. REFIT is a mode of `edgeprune.refit` (none, bias,
least-squares, reconstruct, intercept). What is left empty or out is the default of `Settings`. Our rows are the presets
of the product, and the best of them with a recovery, which alone is trained as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from edgeprune.presets import PRESETS
from edgeprune.pruning import Settings
from edgeprune_runtime.errors import EdgepruneError

Kind = Literal["other", "fusion", "ours", "trained"]
"""A row to be beaten, a row that shows what fusing does, a row of ours, or one of ours that is then trained."""


@dataclass(frozen=True)
class Recipe:
    """A row of the table; `settings.ratio` is replaced by each ratio of the table."""

    name: str
    kind: Kind
    settings: Settings

    def at(self, ratio: float) -> Settings:
        """The settings that remove this share of all parameters."""
        return replace(self.settings, ratio=ratio)


_BEST = PRESETS["best"]

NAMED: Mapping[Kind, Sequence[str]] = {
    "other": (
        # Taylor "element 1"; `protect` leaves 4 and 2 of 30 or 32 blocks alone, the paper's choice.
        "LLM-Pruner=taylor-fine|protect|none|even",
        "FLAP=flap|flap|bias|auto",
        # `mixed` widths differ by one step of alignment at most: so every row gives equally many parameters.
        "Wanda-sp=wanda-sp|uniform:mixed|none|even",
        "OBS uniform=obs|uniform:mixed|least-squares|even",
    ),
    "fusion": (
        "coarse alone=taylor-coarse|protect|least-squares|auto",
        "fine alone=taylor-fine|protect|least-squares|auto",
        "fused=fusion|protect|least-squares|auto",
    ),
    "ours": tuple(
        f"ours, {name}={preset.method}|{preset.allocation}|{preset.refit}" for name, preset in PRESETS.items()
    ),
    "trained": (f"ours, best, recovered={_BEST.method}|{_BEST.allocation}|{_BEST.refit}||lora",),
}
"""The rows of the full table. Coarse, fine and fused share allocation and refit, so that only the scores differ."""


def named(base: Settings, kinds: Sequence[Kind] = get_args(Kind)) -> list[Recipe]:
    """The recipes of the full table, or those of some kinds."""
    return [parse_recipe(text, base, kind) for kind in kinds for text in NAMED[kind]]


def parse_recipe(text: str, base: Settings, kind: Kind = "ours") -> Recipe:
    """The recipe NAME=METHOD|ALLOCATION|REFIT|HEADS|RECOVER.

    Raises:
        EdgepruneError: if it is not of that form, or names what does not exist.
    """
    name, equals, spec = text.partition("=")
    parts = spec.split("|")
    if not equals or not name or len(parts) > 5:
        raise EdgepruneError(f"recipe {text!r} was not understood; expected NAME=METHOD|ALLOCATION|REFIT|HEADS|RECOVER")
    given = dict(zip(("method", "allocation", "refit", "heads", "recover"), parts, strict=False))
    chosen: dict[str, Any] = {field: value for field, value in given.items() if value}
    settings = replace(base, **chosen)
    settings.check()
    return Recipe(name, "trained" if settings.recover_passes else kind, settings)


def describe(settings: Settings) -> str:
    """What a recipe chooses, in words."""
    refit = "no refit" if settings.refit == "none" else settings.refit
    recover = "" if settings.recover == "none" else f", recover {settings.recover}"
    return f"{settings.method}, {settings.allocation}, {refit}, heads {settings.heads}{recover}"
