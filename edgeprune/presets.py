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
    refit: str
    calibration_sequences: int
    calibration_tokens: int
    gradient_sequences: int

    def values(self) -> dict[str, str | int]:
        """Option -> value."""
        return {name: value for name, value in asdict(self).items() if name != "summary"}

    def __str__(self) -> str:
        """The values in short, such as "wanda-sp, protect, least-squares, 64x512 tokens"."""
        tokens = f"{self.calibration_sequences}x{self.calibration_tokens} tokens"
        return f"{self.method}, {self.allocation}, {self.refit}, {tokens}"


PRESETS: Mapping[str, Preset] = {
    "fast": Preset(
        "a forward pass scores the units, fixed widths, refit in closed form",
        method="wanda-sp",
        allocation="protect",
        refit="least-squares",
        calibration_sequences=64,
        calibration_tokens=512,
        gradient_sequences=32,  # unread, unless the user asks for a method with gradients
    ),
    "balanced": Preset(
        "a forward pass scores the units, the best rule for widths, every MLP is reconstructed",
        method="wanda-sp",
        allocation="judged",
        refit="reconstruct",
        calibration_sequences=64,
        calibration_tokens=512,
        gradient_sequences=32,
    ),
    "best": Preset(
        "the best scores and the best rule for widths, every MLP is reconstructed for longer and on more text",
        method="fisher",
        allocation="judged:obs",
        refit="reconstruct:8",
        calibration_sequences=256,
        calibration_tokens=512,
        gradient_sequences=224,
    ),
}
DEFAULT_PRESET = "balanced"
