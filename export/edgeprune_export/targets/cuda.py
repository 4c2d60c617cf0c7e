"""Sixteen bits and fused attention, for NVIDIA GPUs.

The CUDA provider of ONNX Runtime 1.31 has GroupQueryAttention for float16 and bfloat16 only: in variants that compute
in float32 (fp32, int8, int4) attention would run on the CPU, with a copy there and back in every layer. That it takes
`attention_bias` is new; the kernel of 1.27 ends with an error.
"""

PROVIDER = "cuda"
PRECISIONS = ("fp16",)
NOTES = (
    "needs onnxruntime-gpu 1.31 or later: older CUDA kernels of GroupQueryAttention refuse an attention bias",
    "of the variants fp16 alone stays on the GPU as a whole: the CUDA provider has no attention in float32",
)
VERIFIED = "checked against torch with the CPU provider; no NVIDIA GPU was at hand"
