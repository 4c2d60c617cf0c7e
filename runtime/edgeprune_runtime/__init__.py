"""Device side of edgeprune: loads a bundle with ONNX Runtime, runs it, checks it and measures it. No torch."""

__version__ = "0.1.0"
