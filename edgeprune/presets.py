"""Presets: options of `compress` that are chosen together, from quick to careful. Imports little, as `--help` does.

    edgeprune compress MODEL --preset best

An option that the user gives wins over the preset's value.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Preset:
    """Values of the options of `compress` that have the fields' names, and what they amount to in words."""

    summary: str
    method: str
    allocation: str
    calibration_sequences: int
    calibration_tokens: int
    gradient_sequences: int

    def values(self) -> dict[str, str | int]:
        """Option -> value."""
        return {name: value for name, value in asdict(self).items() if name != "summary"}

    def __str__(self) -> str:
        """The values in short, such as "wanda-sp, protect, 64x512 tokens"."""
        return f"{self.method}, {self.allocation}, {self.calibration_sequences}x{self.calibration_tokens} tokens"


PRESETS: Mapping[str, Preset] = {
    "fast": Preset(
        "a forward pass scores the units, fixed widths",
        method="wanda-sp",
        allocation="protect",
        calibration_sequences=64,
        calibration_tokens=512,
        gradient_sequences=32,  # unread, unless the user asks for a method with gradients
    ),
    "balanced": Preset(
        "gradients score the units, fixed widths",
        method="fisher",
        allocation="protect",
        calibration_sequences=64,
        calibration_tokens=512,
        gradient_sequences=32,
    ),
    "best": Preset(
        "gradients score the units, a search finds the widths",
        method="fisher",
        allocation="search",
        calibration_sequences=128,
        calibration_tokens=512,
        gradient_sequences=112,  # all but those that the search judges on
    ),
}
DEFAULT_PRESET = "balanced"
