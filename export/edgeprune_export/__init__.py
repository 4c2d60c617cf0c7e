"""Export side of edgeprune: a pruned or dense checkpoint becomes an ONNX bundle that provably computes the same."""
