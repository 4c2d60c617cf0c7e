"""Files in ONNX Runtime's own format, as phones run them, write the tokens that the bundle's graphs write."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from consumed import BUNDLES, NEW_TOKENS, VARIANTS, greedy, prompts, until_end

from edgeprune_export.ort_format import convert_to_ort, mobile_findings
from edgeprune_runtime.bundle import open_bundle

pytestmark = pytest.mark.consumers
OPERATOR_BYTES = 100_000


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def written(model: Path, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens after a prompt, from a session that leaves the weights in the file, mapped into memory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
    options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    past = {
        node.name: np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
    names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
    new, tokens = np.array([prompt]), list(prompt)
    while len(tokens) < len(prompt) + NEW_TOKENS:
        mask = np.ones((1, len(tokens)), np.int64)
        logits, *presents = session.run(names, {"input_ids": new, "attention_mask": mask, **past})
        tokens.append(int(logits[0, -1].argmax()))
        new, past = np.array([tokens[-1:]]), dict(zip(past, presents, strict=True))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_from_every_variant(bundle: Path, variant: str, tmp_path: Path) -> None:
    opened = open_bundle(bundle, variant)
    files = convert_to_ort(opened.graph_path, tmp_path)
    manifest = opened.manifest
    table_bytes = 4 * max(layer.head_dim for layer in manifest.layers) * manifest.context_tokens
    # What embedding and output share is in it once, and so are the cosines and sines, which the bundle only describes;
    # for the operators themselves it takes more room than ONNX.
    assert files.size_bytes < 1.03 * (opened.size_bytes + table_bytes) + OPERATOR_BYTES
    for prompt in prompts(bundle)[:3]:
        assert until_end(bundle, written(files.model, prompt)) == greedy(bundle, variant, prompt)


@pytest.mark.parametrize("variant", VARIANTS)
def test_usability_check_advises_the_cpu(bundle: Path, variant: str) -> None:
    """Attention and normalisation are fused for ONNX Runtime's CPU; no phone's accelerator takes them."""
    found = mobile_findings(open_bundle(bundle, variant).graph_path)
    assert found.recommended == ()
    for accelerator in found.accelerators:
        assert "com.microsoft:GroupQueryAttention" in accelerator.unsupported_operators
