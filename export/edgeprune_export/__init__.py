"""Export side of edgeprune: a pruned or dense checkpoint becomes an ONNX bundle that provably computes the same."""

import edgeprune_runtime as edgeprune_runtime  # before any module here imports ONNX Runtime: no telemetry
