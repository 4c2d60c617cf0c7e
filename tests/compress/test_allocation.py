"""Allocation: the ratio is met, the guards hold, and each method does what it says."""

import pytest
import torch
from toys import NAMES, toy

from edgeprune import plugins
from edgeprune.budget import HEAD_PRICE
from edgeprune.groups import LayerWidths, check_keep, layer_widths
from edgeprune.pruning import RATIO_TOLERANCE, Settings, allocate, make_problem, model_groups
from edgeprune.shrink import linear_shapes, parameters_removed
from edgeprune_runtime.errors import EdgepruneError

WIDE = {"hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 64}


def scored(name: str = "llama", seed: int = 0, **changes: object) -> tuple[object, list, dict[str, torch.Tensor]]:
    if name == "smollm3":
        changes.setdefault("no_rope_layers", [1] * 6)
    model = toy(name, **WIDE | changes)
    groups = model_groups(model)
    generator = torch.Generator().manual_seed(seed)
    return model, groups, {group.name: torch.rand(group.units, generator=generator) for group in groups}


def share_removed(model: torch.nn.Module, groups: list, keep: dict) -> float:
    total = sum(parameter.numel() for parameter in model.parameters())
    return parameters_removed(groups, keep, linear_shapes(model, groups)) / total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("allocation", ["uniform:mixed", "protect", "protect:1,1", "global", "global:0.9"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_the_ratio_is_met(name: str, allocation: str, ratio: float) -> None:
    model, groups, scores = scored(name)
    settings = Settings(ratio, allocation=allocation, align=1, min_channels=4)
    keep = allocate(model, groups, scores, settings)
    check_keep(groups, keep)
    assert abs(share_removed(model, groups, keep) - ratio) <= RATIO_TOLERANCE


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4])
def test_uniform_gives_all_layers_the_same_widths(ratio: float) -> None:
    model, groups, scores = scored()
    keep = allocate(model, groups, scores, Settings(ratio, allocation="uniform", align=1))
    assert len(set(layer_widths(groups, keep))) == 1
    assert abs(share_removed(model, groups, keep) - ratio) < 0.01


def test_uniform_mixed_differs_by_one_step_only() -> None:
    model, groups, scores = scored()
    keep = allocate(model, groups, scores, Settings(0.2, allocation="uniform:mixed", align=16, min_channels=16))
    channels = {widths.channels for widths in layer_widths(groups, keep)}
    assert max(channels) - min(channels) <= 16


def test_protect_leaves_the_first_and_last_blocks_whole() -> None:
    model, groups, scores = scored()
    keep = allocate(model, groups, scores, Settings(0.2, allocation="protect:2,1", align=8))
    widths = layer_widths(groups, keep)
    whole = layer_widths(groups, {})[0]
    assert [width == whole for width in widths] == [True, True, False, False, False, True]


@pytest.mark.parametrize("argument", ["5,1", "6,0"])
def test_protect_refuses_what_leaves_no_layer(argument: str) -> None:
    model, groups, scores = scored()
    with pytest.raises(EdgepruneError, match="leaves none"):
        allocate(model, groups, scores, Settings(0.1, allocation=f"protect:{argument}"))


@pytest.mark.parametrize("allocation", ["protect:x", "protect:1", "protect:-1,2", "uniform:x", "global:0", "global:x"])
def test_a_wrong_argument_is_refused_before_the_work(allocation: str) -> None:
    with pytest.raises(EdgepruneError, match="expected"):
        Settings(0.1, allocation=allocation).check()


@pytest.mark.parametrize("allocation", ["protect:2,2", "global:0.2"])
def test_a_ratio_that_the_allocation_cannot_reach_is_refused(allocation: str) -> None:
    model, groups, scores = scored()
    with pytest.raises(EdgepruneError, match="cannot give more"):
        allocate(model, groups, scores, Settings(0.6, allocation=allocation, align=1, min_channels=4))


@pytest.mark.parametrize("allocation", ["uniform:mixed", "protect", "global"])
def test_channels_that_are_cut_are_aligned(allocation: str) -> None:
    model, groups, scores = scored(intermediate_size=150)
    keep = allocate(model, groups, scores, Settings(0.2, allocation=allocation, align=16, min_channels=16))
    for widths in layer_widths(groups, keep):
        assert widths.channels == 150 or widths.channels % 16 == 0


def test_the_best_units_stay() -> None:
    model, groups, scores = scored()
    keep = allocate(model, groups, scores, Settings(0.3, allocation="uniform", align=1))
    for group in groups:
        if group.kind == "channels":
            kept = list(keep[group.name])
            gone = [unit for unit in range(group.units) if unit not in kept]
            assert scores[group.name][kept].min() >= scores[group.name][gone].max()


@pytest.mark.parametrize("allocation", ["uniform", "protect:1,1", "global"])
def test_heads_that_are_kept_stay_whole(allocation: str) -> None:
    model, groups, scores = scored()
    settings = Settings(0.2, allocation=allocation, align=1, min_channels=4, heads="keep")
    keep = allocate(model, groups, scores, settings)
    assert {(widths.heads, widths.kv_heads) for widths in layer_widths(groups, keep)} == {(6, 3)}
    assert abs(share_removed(model, groups, keep) - 0.2) < 0.01


def test_even_takes_the_same_share_of_heads_and_channels() -> None:
    model, groups, scores = scored(num_attention_heads=12, num_key_value_heads=12, head_dim=4)
    keep = allocate(model, groups, scores, Settings(0.4, allocation="uniform", align=1, heads="even"))
    widths = layer_widths(groups, keep)[0]
    assert widths.heads / 12 == pytest.approx(widths.channels / 160, abs=0.05)


def test_auto_takes_heads_where_their_score_is_the_lesser_loss() -> None:
    model, groups, scores = scored()
    cheap = {name: values * (1e-6 if "heads" in name else 1.0) for name, values in scores.items()}
    dear = {name: values * (1e6 if "heads" in name else 1.0) for name, values in scores.items()}
    settings = Settings(0.2, allocation="uniform", align=1)
    assert layer_widths(groups, allocate(model, groups, cheap, settings))[0].heads < 6
    assert layer_widths(groups, allocate(model, groups, dear, settings))[0].heads == 6


def test_even_has_no_meaning_under_global() -> None:
    with pytest.raises(EdgepruneError, match="even"):
        Settings(0.2, allocation="global", heads="even").check()


def test_an_unknown_heads_mode_is_refused() -> None:
    with pytest.raises(EdgepruneError, match="--heads"):
        Settings(0.2, heads="some").check()


def test_global_takes_from_the_layers_that_matter_least() -> None:
    model, groups, scores = scored()
    for group in groups:
        scores[group.name] += 10.0 * group.layer
    keep = allocate(model, groups, scores, Settings(0.2, allocation="global:0.9", align=8, min_channels=8))
    channels = [widths.channels for widths in layer_widths(groups, keep)]
    assert channels[0] < 160
    assert channels[-1] == 160
    assert channels == sorted(channels)


def test_global_lets_no_layer_lose_more_than_its_share() -> None:
    model, groups, scores = scored()
    scores = {name: values * (1e-6 if name.startswith("layers.2") else 1.0) for name, values in scores.items()}
    keep = allocate(model, groups, scores, Settings(0.2, allocation="global:0.5", align=8, min_channels=8))
    assert layer_widths(groups, keep)[2].channels == 80


@pytest.mark.parametrize("argument", ["0", "1.5", "much", "nan"])
def test_global_refuses_what_is_no_share(argument: str) -> None:
    with pytest.raises(EdgepruneError, match="share"):
        Settings(0.1, allocation=f"global:{argument}").check()


def test_attention_choices_keep_the_best_heads_inside_the_best_kv_heads() -> None:
    model, groups, scores = scored()  # 6 query heads on 3 KV heads
    scores["layers.0.heads"] = torch.tensor([1.0, 5.0, 2.0, 2.5, 9.0, 0.1])
    scores["layers.0.kv_heads"] = torch.tensor([0.0, 0.0, 0.0])
    layer = make_problem(model, groups, scores, Settings(0.1)).layers[0]
    choices = {(choice.kv_heads, choice.heads_each): choice for choice in layer.attention_choices}
    assert len(choices) == 6
    assert choices[3, 2].parameters == 0
    assert choices[3, 1].keep_heads == (1, 3, 4)
    assert choices[1, 1].keep_kv_heads == (2,)
    assert choices[1, 2].keep_heads == (4, 5)
    assert choices[2, 1].loss == pytest.approx(HEAD_PRICE * (1.0 + 4.5 + 0.1))


def test_at_least_one_head_and_min_channels_stay() -> None:
    model, groups, scores = scored()
    settings = Settings(0.9, allocation="global:1", align=1, min_channels=10)
    with pytest.raises(EdgepruneError, match="cannot be reached"):
        allocate(model, groups, scores, settings)
    problem = make_problem(model, groups, scores, settings)
    most = problem.removable / sum(parameter.numel() for parameter in model.parameters())
    keep = allocate(model, groups, scores, Settings(most - 0.01, allocation="global:1", align=1, min_channels=10))
    for widths in layer_widths(groups, keep):
        assert isinstance(widths, LayerWidths)
        assert widths.channels >= 10
        assert widths.kv_heads >= 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.91, 5.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(EdgepruneError, match="ratio"):
        Settings(ratio).check()


def test_an_unknown_allocation_names_the_nearest() -> None:
    with pytest.raises(EdgepruneError, match="did you mean 'global'"):
        Settings(0.2, allocation="globl").check()


def test_every_allocation_is_tested_here() -> None:
    assert set(plugins.names("allocation")) == {"uniform", "protect", "global"}
