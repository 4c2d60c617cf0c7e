"""edgeprune: physically smaller language models, exported to ONNX and proven with ONNX Runtime."""

from typing import TYPE_CHECKING, Any

from edgeprune_runtime import __version__

if TYPE_CHECKING:
    from edgeprune.checkpoint import load_pruned

__all__ = ["__version__", "load_pruned"]


def __getattr__(name: str) -> Any:
    """`load_pruned` on first use: `import edgeprune` alone must not import torch."""
    if name == "load_pruned":
        from edgeprune.checkpoint import load_pruned

        return load_pruned
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
