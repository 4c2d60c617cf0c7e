"""Plain operators of opset 18, for DirectX 12 GPUs on Windows.

DirectML's own documentation ends at opset 20, so that Attention and RMSNormalization of opset 23 would run on the CPU.
Its GroupQueryAttention wants query, key and value apart, rotates nothing itself, reads no mask, and takes every call of
more than one token for a first prompt: the second piece of a long prompt would be wrong without any error.
"""

PROVIDER = "directml"
GRAPH_SOURCE = "plain"
PRECISIONS = ("fp32",)
NOTES = ("attention is written as products and a softmax, which DirectML takes; its GroupQueryAttention sees no mask",)
VERIFIED = "checked against torch with the CPU provider; no DirectX GPU was at hand"
