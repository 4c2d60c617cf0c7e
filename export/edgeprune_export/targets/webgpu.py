"""Four bits as transformers.js loads them (q4), for GPUs in browsers.

WebGPU has kernels for GroupQueryAttention, MatMulNBits and GatherBlockQuantized, but none for FusedMatMul: the tied
head of fp32 and fp16 would run on the CPU.
"""

from edgeprune_export.targets.wasm import BROWSER_BUFFER_BYTES

PROVIDER = "webgpu"
PRECISIONS = ("int4",)
MAX_DATA_BYTES = BROWSER_BUFFER_BYTES
NOTES = (
    "WebGPU's attention counts positions by slot: one text at a time, or texts padded on the left",
    'transformers.js: pipeline("text-generation", folder, { device: "webgpu", dtype: "q4" })',
)
VERIFIED = (
    "a toy is run by headless Chromium's WebGPU on an adapter that computes on the CPU, and writes the same tokens as "
    "our own runtime does at --accuracy-level 0; no GPU was at hand"
)
