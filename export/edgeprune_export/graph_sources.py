"""Who builds the graph of a model.

decoder   fused operators, streamed from the checkpoint; of Llama-like architectures
traced    standard operators of opset 23, from the model's own torch code
plain     the same in operators of opset 18 that every runtime knows, with no operator for a whole attention
"""

from typing import cast, get_args

from edgeprune.configs import architecture
from edgeprune_runtime.bundle import GraphSource
from edgeprune_runtime.errors import EdgepruneError

GRAPH_SOURCES = ("auto", *get_args(GraphSource))


def graph_source_of(model_type: str, wanted: str = "auto") -> GraphSource:
    """Who builds the graph of a model; "auto" asks its architecture file.

    Raises:
        EdgepruneError: if there is no such builder, or it does not know the architecture.
    """
    source: GraphSource = architecture(model_type).SOURCE
    if wanted not in GRAPH_SOURCES:
        raise EdgepruneError(f"unknown graph source {wanted!r}; expected {', '.join(GRAPH_SOURCES)}")
    if wanted == "auto":
        return source
    if wanted == "decoder" and source != "decoder":
        raise EdgepruneError(f"the decoder graph does not know {model_type!r}; use --graph-source traced")
    return cast("GraphSource", wanted)
