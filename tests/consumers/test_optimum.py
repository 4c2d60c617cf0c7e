"""Optimum's ORTModelForCausalLM, in its own environment: right where heads are whole, and no other model loads there.

It takes `hidden_size // num_attention_heads` of `config.json` for the head_dim and one KV head count for all layers, so
a model that has lost heads does not run, whether its layers differ or not. Of `position_ids`, which it misses in our
graphs, it only warns: they take positions from the attention mask.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from consumed import BUNDLES, NEW_TOKENS, VARIANTS, WriteBundle, greedy, prompts, until_end
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgeprune_runtime.bundle import graph_file, open_bundle

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".consumers/optimum/bin/python"

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs Optimum's environment; `make consumers` makes it"),
]


Rows = Sequence[Sequence[int]]


def optimum(bundle: Path, variant: str, batches: Sequence[Rows]) -> subprocess.CompletedProcess[str]:
    padding = open_bundle(bundle).manifest.pad_token_id or 0
    wanted = {"batches": batches, "new_tokens": NEW_TOKENS, "padding": padding}
    command = [str(PYTHON), str(HERE / "optimum_script.py"), str(bundle), Path(graph_file(variant)).name]
    return subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False, timeout=600)


def check_same_tokens(bundle: Path, variant: str, rows: Rows) -> None:
    """One by one, and as one batch that is padded before its tokens."""
    done = optimum(bundle, variant, [*([row] for row in rows), rows])
    assert done.returncode == 0, done.stderr
    *alone, batch = json.loads(done.stdout)
    expected = [greedy(bundle, variant, row) for row in rows]
    assert [until_end(bundle, tokens) for [tokens] in alone] == expected
    assert [until_end(bundle, tokens) for tokens in batch] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_where_heads_are_whole(variant: str, whole_heads_bundle: Path) -> None:
    check_same_tokens(whole_heads_bundle, variant, prompts(whole_heads_bundle))


def test_same_tokens_of_a_trained_model(stories260k: Path, write_bundle: WriteBundle) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(stories260k, dtype="float32").eval()
    kv_heads = [range(model.config.num_key_value_heads)] * model.config.num_hidden_layers
    bundle = write_bundle(model, AutoTokenizer.from_pretrained(stories260k), kv_heads, (172, 150, 131, 140, 97))
    # its context is 512 tokens
    check_same_tokens(bundle, "fp32", prompts(bundle)[:3])


def test_same_tokens_of_smollm2_with_whole_heads(write_smollm2: Callable[..., Path]) -> None:
    little_text = ("--calibration-sequences", 8, "--calibration-tokens", 128)
    bundle = write_smollm2("--heads", "keep", *little_text, precision="fp32,int8")
    check_same_tokens(bundle, "fp32", prompts(bundle))
    check_same_tokens(bundle, "int8", prompts(bundle)[:1])


@pytest.mark.parametrize("cut", ["evenly_cut_bundle", *BUNDLES])
def test_model_without_some_heads_does_not_run(cut: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(cut)
    done = optimum(bundle, "fp32", [prompts(bundle)[:1]])
    assert done.returncode != 0
    assert "Got invalid dimensions for input: past_key_values." in done.stderr
