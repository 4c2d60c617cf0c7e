"""Eight bits in blocks, for ONNX Runtime on processors."""

PROVIDER = "cpu"
PRECISIONS = ("int8",)
NOTES = (
    "products round their inputs to 8 bits as well, which processors multiply fastest; --accuracy-level 0 does not",
)
VERIFIED = "run on x86-64 processors; Arm processors were not at hand"
