"""Eight bits as transformers.js loads them (int8), for processors in browsers.

onnxruntime-web has no WebAssembly kernel for MatMulNBits, the product of int8 and int4: it turns their weights into
float32 at every call. It has one for whole numbers times whole numbers.
"""

BROWSER_BUFFER_BYTES = 0x7FE00000
"""The largest ArrayBuffer of Chrome, which a downloaded file must fit in; WebAssembly addresses twice as much."""

PROVIDER = "cpu"
PRECISIONS = ("int8-dynamic",)
MAX_DATA_BYTES = BROWSER_BUFFER_BYTES
NOTES = (
    'transformers.js: pipeline("text-generation", folder, { device: "wasm", dtype: "int8" })',
    "of the variants that are smaller than fp32, int8-dynamic is the one that WebAssembly multiplies fast: int8 and "
    "int4 take several times as long as fp32 for each token; long prompts take it about twice as long as fp32",
)
VERIFIED = (
    "a toy and SmolLM2 without a fifth of its parameters are run by headless Chromium's WebAssembly on an x86-64 "
    "processor and write the same tokens as our own runtime; no other browser was at hand"
)
