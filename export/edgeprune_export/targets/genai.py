"""Eight bits with a shared KV cache, for onnxruntime-genai on processors."""

from edgeprune_export.genai import MAX_LENGTH_TOKENS
from edgeprune_export.targets.cpu import PRECISIONS as PRECISIONS
from edgeprune_export.targets.cpu import PROVIDER as PROVIDER

NOTES = (
    "needs onnxruntime-genai 0.15 or later, which reads the KV heads of each layer off the graph",
    f"genai_config.json sets max_length to {MAX_LENGTH_TOKENS} tokens or the context, as a session takes memory for "
    "that many at once; new keys are written into the buffer that holds the old ones, where attention is fused",
)
VERIFIED = "run by onnxruntime-genai 0.18 on x86-64 processors, which writes the same tokens as our own"
