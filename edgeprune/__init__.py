"""edgeprune: physically smaller language models, exported to ONNX and proven with ONNX Runtime."""

from edgeprune_runtime import __version__

__all__ = ["__version__"]
