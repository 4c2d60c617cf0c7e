"""How far the graphs of a model reach, from configs as the hub has them."""

from typing import Any

import pytest
import toys
from transformers import CONFIG_MAPPING

from edgeprune_export.positions import (
    DEFAULT_CONTEXT_TOKENS,
    check_causal,
    check_rope,
    constant_rope,
    context_note,
    context_tokens,
    window_of,
)
from edgeprune_runtime.errors import EdgepruneError

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
PHI3: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "vocab_size": 40000,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
}


def config_of(model_type: str, **settings: Any) -> Any:
    return CONFIG_MAPPING[model_type].from_dict({"model_type": model_type, **settings})


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (config_of("llama", max_position_embeddings=2048), 2048),
        (config_of("gpt2", n_positions=1024), 1024),
        (config_of("bloom", seq_length=1000), 1000),
        (config_of("bloom"), DEFAULT_CONTEXT_TOKENS),
        (config_of("phi3", **PHI3, rope_scaling=LONGROPE), 4096),
        (config_of("phi3", **PHI3), 131072),
    ],
)
def test_context_ends_where_positions_or_their_frequencies_do(config: Any, tokens: int) -> None:
    assert context_tokens(config) == tokens
    stated = getattr(config, "max_position_embeddings", tokens)
    assert (context_note(config) is None) == (stated == tokens)


def test_windows_are_those_of_the_layers_that_slide() -> None:
    assert [window_of(toys.toy("gemma2").config, layer) for layer in range(3)] == [4, None, 4]
    assert window_of(config_of("mistral", sliding_window=7), 0) == 7
    assert window_of(config_of("qwen2", use_sliding_window=False, sliding_window=7), 0) is None


def test_rope_that_is_not_known_to_be_constant_is_refused() -> None:
    config = toys.toy("llama").config
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(EdgepruneError, match=r"rope_type 'spiral'.*expected one of default"):
        check_rope(config)


@pytest.mark.parametrize("name", ["phi3-longrope", "gemma3_text"])
def test_rotary_modules_are_as_they_were_after_tracing(name: str) -> None:
    rotary = toys.toy(name).base_model.rotary_emb
    before = rotary.rope_type
    model = toys.toy(name)
    with constant_rope(model):
        inside = model.base_model.rotary_emb.rope_type
        assert set(inside.values() if isinstance(inside, dict) else [inside]) == {"default"}
    assert model.base_model.rotary_emb.rope_type == before


def test_model_that_sees_the_future_is_refused() -> None:
    config = toys.toy("gemma3_text").config
    check_causal(config)
    config.use_bidirectional_attention = True
    with pytest.raises(EdgepruneError, match="use_bidirectional_attention"):
        check_causal(config)
