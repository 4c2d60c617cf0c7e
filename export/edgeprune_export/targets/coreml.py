"""Products on Apple's accelerators, attention and its cache on the CPU.

The CoreML provider ends with an error when an input has no elements, as the KV cache has before the first token. In the
decoder graph the cache is read by GroupQueryAttention alone, which CoreML does not take; in the other graphs it is read
by Concat, which it does take. MatMulNBits is not taken either: the products of int8 and int4 would all be the CPU's.
"""

PROVIDER = "coreml"
GRAPH_SOURCE = "decoder"
PRECISIONS = ("fp32",)
NOTES = (
    "edgeprune asks CoreML for its newer format, which takes more products; a program of your own gives the provider "
    "the option ModelFormat=MLProgram",
    "norms and attention stay on the CPU; of the variants, CoreML multiplies by float weights only",
)
VERIFIED = "checked against torch with the CPU provider; no Apple device was at hand"
