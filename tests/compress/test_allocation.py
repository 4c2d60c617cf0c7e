"""Allocation: the ratio is met, the guards hold, and each method does what it says."""

import itertools
from dataclasses import replace

import pytest
import torch
from toys import KINDS, per_layer_lists, toy

from edgeprune import plugins
from edgeprune.allocation import flap, influence, knapsack
from edgeprune.budget import (
    HEAD_PRICE,
    LARGEST_SHARES,
    Heads,
    Layer,
    Problem,
    cut_cheapest,
    cut_evenly,
    relative_price,
    removed,
)
from edgeprune.groups import Group, LayerWidths, Slot, check_keep, kept, layer_widths
from edgeprune.pruning import RATIO_TOLERANCE, Settings, allocate, make_problem, model_groups
from edgeprune.shrink import linear_shapes, parameters_removed, shrink
from edgeprune_runtime.errors import EdgepruneError

WIDE = {"hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 6, "vocab_size": 64}
INFLUENCE = (0.4, 0.1, 0.05, 0.04, 0.06, 0.2)


def scored(name: str = "llama", seed: int = 0, **changes: object) -> tuple[object, list, dict[str, torch.Tensor]]:
    sizes = WIDE | changes
    model = toy(name, **sizes | per_layer_lists(name, sizes["num_hidden_layers"]))
    groups = model_groups(model)
    generator = torch.Generator().manual_seed(seed)
    return model, groups, {group.name: torch.rand(group.units, generator=generator) for group in groups}


def share_removed(model: torch.nn.Module, groups: list, keep: dict) -> float:
    total = sum(parameter.numel() for parameter in model.parameters())
    return parameters_removed(groups, keep, linear_shapes(model, groups)) / total


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "allocation", ["uniform:mixed", "protect", "protect:1,1", "global", "knapsack", "flap", "influence"]
)
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.35])
def test_the_ratio_is_met(name: str, allocation: str, ratio: float) -> None:
    model, groups, scores = scored(name)
    settings = Settings(ratio, allocation=allocation, align=1, min_channels=4)
    keep = allocate(model, groups, scores, settings, INFLUENCE)
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


@pytest.mark.parametrize(
    "allocation",
    ["protect:x", "protect:1", "protect:-1,2", "uniform:x", "global:x", "knapsack:0", "flap:2", "influence:1"],
)
def test_a_wrong_argument_is_refused_before_the_work(allocation: str) -> None:
    with pytest.raises(EdgepruneError, match="expected"):
        Settings(0.1, allocation=allocation).check()


@pytest.mark.parametrize("allocation", ["protect:2,2", "global:0.2"])
def test_a_ratio_that_the_allocation_cannot_reach_is_refused(allocation: str) -> None:
    model, groups, scores = scored()
    with pytest.raises(EdgepruneError, match="cannot give more"):
        allocate(model, groups, scores, Settings(0.7, allocation=allocation, align=1, min_channels=4))


@pytest.mark.parametrize("allocation", ["uniform:mixed", "protect", "global", "knapsack", "flap", "influence"])
def test_channels_that_are_cut_are_aligned(allocation: str) -> None:
    model, groups, scores = scored(intermediate_size=150)
    keep = allocate(model, groups, scores, Settings(0.2, allocation=allocation, align=16, min_channels=16), INFLUENCE)
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


@pytest.mark.parametrize("allocation", ["uniform", "protect:1,1", "global", "knapsack", "flap", "influence"])
def test_heads_that_are_kept_stay_whole(allocation: str) -> None:
    model, groups, scores = scored()
    settings = Settings(0.2, allocation=allocation, align=1, min_channels=4, heads="keep")
    keep = allocate(model, groups, scores, settings, INFLUENCE)
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


@pytest.mark.parametrize("allocation", ["global", "knapsack", "flap"])
def test_even_has_no_meaning_where_heads_and_channels_compete(allocation: str) -> None:
    with pytest.raises(EdgepruneError, match="even"):
        Settings(0.2, allocation=allocation, heads="even").check()


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


@pytest.mark.parametrize("allocation", ["global", "knapsack", "flap"])
@pytest.mark.parametrize("argument", ["0", "1.5", "much", "nan"])
def test_what_is_no_share_is_refused(allocation: str, argument: str) -> None:
    with pytest.raises(EdgepruneError, match=f"{allocation}:.* share"):
        Settings(0.1, allocation=f"{allocation}:{argument}").check()


@pytest.mark.parametrize(
    "allocation", ["uniform:mixed", "protect:1,0", "influence", "knapsack:1", "global:1", "flap:1"]
)
@pytest.mark.parametrize("heads", ["auto", "even"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_model_whose_layers_have_other_heads_already_is_cut_again(allocation: str, heads: Heads, share: float) -> None:
    model, groups, _ = scored()
    shrink(model, groups, {"layers.3.kv_heads": (0,), "layers.3.heads": (0, 1)})
    groups, generator = model_groups(model), torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    settings = Settings(0.1, allocation=allocation, align=1, min_channels=4, heads=heads)
    if allocation.partition(":")[0] in ("global", "knapsack", "flap"):
        settings = replace(settings, heads="auto")
    problem = make_problem(model, groups, scores, settings)
    chosen = problem.layers[1:] if allocation == "protect:1,0" else problem.layers
    removable = sum(map(problem.removable_from, chosen)) / sum(parameter.numel() for parameter in model.parameters())
    keep = allocate(model, groups, scores, replace(settings, ratio=share * removable), INFLUENCE)
    check_keep(groups, keep)
    assert abs(share_removed(model, groups, keep) - share * removable) <= RATIO_TOLERANCE
    if share == 0.9 and allocation in ("uniform:mixed", "protect:1,0"):
        assert all(len(kept(keep, layer.heads)) < layer.heads.units for layer in chosen)


def test_attention_that_takes_too_much_at_once_is_cut_by_less() -> None:
    problem = problem_of(**SMOL | {"layers": 1, "channels": 64}, remove=0, align=64, min_channels=64)
    (layer,) = problem.layers
    # one KV head is the cheapest step for each parameter, and takes more than shall leave
    choices = {choice.counts: choice.parameters for choice in layer.attention_choices}
    problem = replace(problem, remove=choices[3, 2])
    cut = cut_cheapest(problem, lambda _, at, to: float(at[0].kv_heads == to[0].kv_heads))
    assert cut[0][0].counts == (3, 2)


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
    tested_here = {"uniform", "protect", "global", "knapsack", "flap", "influence"}
    assert set(plugins.names("allocation")) - {"judged", "search"} == tested_here  # these two: test_search.py


SMOL = {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "channels": 1536}
SMOL_PARAMETERS = 134_515_008


def problem_of(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    channels: int,
    remove: int,
    seed: int = 0,
    spread: float = 1.0,
    align: int = 32,
    min_channels: int = 64,
    heads_mode: Heads = "auto",
) -> Problem:
    """An allocation problem without a model; the layers' scores differ in size by e^`spread` and more."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(layers):
        parts = [
            Group(f"layers.{i}.{kind}", kind, i, units, (Slot(f"{i}.{kind}", "out", size),))
            for kind, units, size in (
                ("kv_heads", kv_heads, head_dim),
                ("heads", heads, head_dim),
                ("channels", channels, 1),
            )
        ]
        costs = {parts[0].name: 2 * hidden * head_dim, parts[1].name: 2 * hidden * head_dim, parts[2].name: 3 * hidden}
        scale = torch.exp(spread * torch.randn(1, generator=generator))
        scores = {part.name: scale * torch.rand(part.units, generator=generator) ** 3 for part in parts}
        scores[parts[1].name] *= 40
        found.append(Layer(*parts, scores, costs, keeps_heads=heads_mode == "keep"))
    turned = torch.rand(layers, generator=generator).add(0.02).tolist()
    return Problem(found, remove, align, min_channels, heads_mode, influence=turned)


def parameters_kept(problem: Problem, keep: dict[str, tuple[int, ...]]) -> int:
    return sum(
        len(kept(keep, group)) * layer.unit_parameters[group.name]
        for layer in problem.layers
        for group in (layer.kv_heads, layer.heads, layer.channels)
    )


def check_guards(problem: Problem, keep: dict[str, tuple[int, ...]]) -> None:
    groups = [group for layer in problem.layers for group in (layer.kv_heads, layer.heads, layer.channels)]
    check_keep(groups, keep)  # at least one of each, equal query heads per KV head
    for layer in problem.layers:
        count = len(kept(keep, layer.channels))
        assert count >= problem.min_channels
        assert count == layer.channels.units or count % problem.align == 0


@pytest.mark.parametrize("allocation", ["uniform:mixed", "protect", "global", "knapsack", "flap", "influence"])
@pytest.mark.parametrize("heads_mode", ["auto", "keep"])
@pytest.mark.parametrize("seed", range(6))
def test_the_exact_sum_leaves_whatever_the_scores_are(allocation: str, heads_mode: Heads, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    kv_heads, head_dim, channels = draw(1, 4), 8 * draw(1, 4), draw(100, 400)
    shape = {"layers": draw(3, 12), "hidden": 32 * draw(1, 6), "kv_heads": kv_heads, "heads": kv_heads * draw(1, 4)}
    problem = problem_of(
        **shape,
        head_dim=head_dim,
        channels=channels,
        remove=0,
        seed=seed,
        spread=seed / 2,
        align=(1, 8, 16)[seed % 3],
        min_channels=draw(1, 20),
        heads_mode=heads_mode,
    )
    most = sum(problem.bounded([0]).removable_from(layer) for layer in problem.layers)
    name, _, argument = allocation.partition(":")
    for part in (0.05, 0.3, 0.6):
        asked = replace(problem, remove=int(part * most))
        keep = plugins.find("allocation", name, "allocation").allocate(asked, argument or None)
        check_guards(asked, keep)
        gone = parameters_kept(asked, {}) - parameters_kept(asked, keep)
        step = asked.align * asked.channel_cost(asked.layers[0])
        # a channel count that is no multiple of `align` makes a first step of another size
        assert abs(gone - asked.remove) <= step, (part, gone, asked.remove, step)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
def test_protect_leaves_something_of_every_block_at_any_ratio(ratio: float) -> None:
    problem = problem_of(**SMOL, remove=round(ratio * SMOL_PARAMETERS), spread=0.2)
    keep = plugins.find("allocation", "protect", "allocation").allocate(problem, None)
    check_guards(problem, keep)
    gone = parameters_kept(problem, {}) - parameters_kept(problem, keep)
    assert abs(gone - problem.remove) <= 0.005 * SMOL_PARAMETERS
    channels = [len(kept(keep, layer.channels)) for layer in problem.layers]
    inner, outer = channels[4:28], channels[:4] + channels[28:]
    assert max(inner) - min(inner) <= problem.align
    assert max(outer) - min(outer) <= problem.align
    assert min(outer) >= min(inner)
    assert min(inner) >= (384 if ratio <= 0.5 else 288)
    if ratio <= 0.4:
        assert min(outer) == 1536


@pytest.mark.parametrize(("layers", "first", "last"), [(5, 0, 0), (7, 0, 0), (8, 1, 0), (12, 2, 1), (32, 4, 2)])
def test_protect_spares_a_part_of_deep_models_and_nothing_of_shallow_ones(layers: int, first: int, last: int) -> None:
    problem = problem_of(**SMOL | {"layers": layers}, remove=layers * 400_000)
    keep = plugins.find("allocation", "protect", "allocation").allocate(problem, None)
    whole = [all(len(kept(keep, g)) == g.units for g in (layer.heads, layer.channels)) for layer in problem.layers]
    assert whole == [i < first or i >= layers - last for i in range(layers)]


def test_protected_blocks_that_the_user_names_stay_whole_or_the_ratio_is_not_met() -> None:
    problem = problem_of(**SMOL, remove=round(0.5 * SMOL_PARAMETERS), spread=0.2)
    protect = plugins.find("allocation", "protect", "allocation")
    keep = protect.allocate(problem, "4,2")
    assert not any(f"layers.{i}.channels" in keep for i in (0, 1, 2, 3, 28, 29))
    gone = parameters_kept(problem, {}) - parameters_kept(problem, keep)
    assert abs(gone - problem.remove) <= 0.005 * SMOL_PARAMETERS


def test_the_bound_on_what_a_layer_may_lose_rises_only_as_far_as_needed() -> None:
    problem = problem_of(**SMOL, remove=round(0.2 * SMOL_PARAMETERS))
    everywhere = range(30)
    assert problem.bounded(everywhere).largest_share == LARGEST_SHARES[0]
    assert problem.bounded([3]).largest_share == 1.0
    more = replace(problem, remove=round(0.62 * SMOL_PARAMETERS)).bounded(everywhere)
    assert LARGEST_SHARES[0] < more.largest_share < 1.0
    assert sum(map(more.removable_from, more.layers)) >= more.remove


def test_influence_gives_shares_in_inverse_proportion_within_bounds() -> None:
    problem = problem_of(**SMOL, remove=round(0.2 * SMOL_PARAMETERS))
    sizes = [layer.parameters for layer in problem.layers]
    mean = problem.remove / sum(sizes)
    found = influence.shares(problem)
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) == pytest.approx(problem.remove)
    assert all(0.5 * mean - 1e-9 <= share <= 1.5 * mean + 1e-9 for share in found)
    free = [i for i, share in enumerate(found) if 0.501 * mean < share < 1.499 * mean]
    products = [found[i] * problem.influence[i] for i in free]
    assert len(free) > 1
    assert products == pytest.approx([products[0]] * len(products))
    order = sorted(range(30), key=lambda i: problem.influence[i])
    assert [found[i] for i in order] == sorted(found, reverse=True)


def test_blocks_of_equal_influence_give_equal_shares() -> None:
    problem = replace(problem_of(**SMOL, remove=round(0.3 * SMOL_PARAMETERS)), influence=[0.1] * 30)
    assert influence.shares(problem) == pytest.approx([0.3 * SMOL_PARAMETERS / problem.layers[0].parameters / 30] * 30)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.55])
def test_influence_takes_least_from_the_blocks_that_turn_the_hidden_state_most(ratio: float) -> None:
    problem = problem_of(**SMOL, remove=round(ratio * SMOL_PARAMETERS))
    keep = influence.allocate(problem, None)
    check_guards(problem, keep)
    sizes = [parameters_kept(replace(problem, layers=[layer]), keep) for layer in problem.layers]
    ends = sorted(range(30), key=lambda i: problem.influence[i])
    assert min(sizes[i] for i in ends[-5:]) > max(sizes[i] for i in ends[:5])


def test_knapsack_is_the_best_solution_of_a_small_problem() -> None:
    for seed in range(5):
        problem = problem_of(
            layers=3,
            hidden=8,
            heads=2,
            kv_heads=1,
            head_dim=4,
            channels=4,
            remove=0,
            seed=seed,
            align=1,
            min_channels=1,
        )
        options = [
            [(choice, count) for choice in problem.attention_choices(layer) for count in problem.channel_counts(layer)]
            for layer in problem.layers
        ]
        for part in (0.2, 0.4):
            asked = replace(problem, remove=int(part * problem.removable))
            cut = cut_cheapest(asked, relative_price)
            gone = removed(asked, cut)
            cuts = (dict(enumerate(choice)) for choice in itertools.product(*options))
            # nothing that removes as much loses less, but for the last step
            best = min(relative_error(asked, other) for other in cuts if removed(asked, other) >= gone)
            spare = max(
                relative_price(
                    layer, (problem.attention_choices(layer)[0], 4), (problem.attention_choices(layer)[-1], 4)
                )
                for layer in problem.layers
            )
            assert relative_error(asked, cut) <= best + spare * 64


def relative_error(problem: Problem, cut: dict) -> float:
    total = 0.0
    for i, (attention, channels) in cut.items():
        layer = problem.layers[i]
        of_channels = sorted(layer.scores[layer.channels.name].tolist())
        total += attention.loss / (
            HEAD_PRICE * float(sum(layer.scores[g.name].sum() for g in (layer.heads, layer.kv_heads)))
        )
        total += sum(of_channels[: len(of_channels) - channels]) / sum(of_channels)
    return total


def test_knapsack_does_not_mind_the_size_of_a_layer_s_scores() -> None:
    problem = problem_of(**SMOL, remove=round(0.2 * SMOL_PARAMETERS))
    layers = [
        replace(layer, scores={name: values * 2.0**i for name, values in layer.scores.items()})
        for i, layer in enumerate(problem.layers)
    ]
    assert knapsack.allocate(problem, None) == knapsack.allocate(replace(problem, layers=layers), None)


def test_knapsack_takes_less_from_a_block_of_more_influence() -> None:
    problem = problem_of(**SMOL, remove=round(0.2 * SMOL_PARAMETERS))
    weighted = [1.0] * 7 + [4.0] + [1.0] * 22
    plain, spared = (
        len(kept(knapsack.allocate(replace(problem, influence=influence), None), problem.layers[7].channels))
        for influence in ((), weighted)
    )
    assert spared > plain


def test_flap_cuts_the_units_below_one_standard_score() -> None:
    problem = problem_of(**SMOL | {"layers": 4, "channels": 300}, remove=0, align=1, min_channels=1)
    problem = replace(problem, remove=problem.removable // 4)
    keep = flap.allocate(problem, "1")
    standard = {}
    for layer in problem.layers:
        values = layer.scores[layer.channels.name]
        standard[layer.channels.name] = (values - values.mean()) / values.std()
    stays = [float(standard[name][list(units)].min()) for name, units in keep.items() if name in standard]
    goes = [
        float(values[[u for u in range(len(values)) if u not in keep[name]]].max()) for name, values in standard.items()
    ]
    assert max(goes) <= min(stays) + 0.02
    gone = parameters_kept(problem, {}) - parameters_kept(problem, keep)
    assert abs(gone - problem.remove) <= problem.channel_cost(problem.layers[0])


def test_flap_tells_scores_apart_beside_an_outlier() -> None:
    problem = problem_of(**SMOL | {"layers": 2}, remove=0, align=1, min_channels=1)
    problem = replace(problem, remove=problem.removable // 4)
    for layer in problem.layers:
        layer.scores[layer.channels.name][7] = 1e10
    for layer in problem.layers:
        keep, values = flap.allocate(problem, "1"), layer.scores[layer.channels.name]
        stays = list(kept(keep, layer.channels))
        assert set(stays) == set(values.topk(len(stays)).indices.tolist())


def test_flap_of_scores_that_are_all_alike_still_meets_the_ratio() -> None:
    problem = problem_of(**SMOL, remove=round(0.2 * SMOL_PARAMETERS))
    flat = [
        replace(layer, scores={name: torch.ones_like(values) for name, values in layer.scores.items()})
        for layer in problem.layers
    ]
    keep = flap.allocate(replace(problem, layers=flat), None)
    check_guards(problem, keep)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35])
def test_equal_widths_end_within_the_tolerance_where_some_do(share: float) -> None:
    """Steps of all layers at once are coarse; another number of heads may come nearer than the cheapest one."""
    sizes = {"layers": 6, "hidden": 64, "heads": 8, "kv_heads": 4, "head_dim": 16, "channels": 256}
    whole = sum(layer.parameters for layer in problem_of(**sizes, remove=0).layers)
    problem = problem_of(**sizes, remove=round(share * whole))
    counts = [
        {i: (problem.attention_choices(layer)[pair], channels) for i, layer in enumerate(problem.layers)}
        for pair in range(len(problem.attention_choices(problem.layers[0])))
        for channels in problem.channel_counts(problem.layers[0])
    ]
    nearest = min(abs(problem.remove - removed(problem, cut)) for cut in counts)
    tolerance = 0.005 * whole
    found = cut_evenly(replace(problem, tolerance=tolerance), range(6), same_widths=True)
    assert abs(problem.remove - removed(problem, found)) <= max(nearest, tolerance)


def test_equal_widths_take_only_counts_of_heads_that_fit() -> None:
    problem = problem_of(layers=4, hidden=64, heads=8, kv_heads=4, head_dim=16, channels=256, remove=40_000, align=1)
    fitting = replace(problem, fits=lambda kv_heads, heads: (kv_heads, heads) in ((4, 8), (2, 4)))
    found = cut_evenly(fitting, range(4), same_widths=True)
    assert all((choice.kv_heads, choice.heads_each) in ((4, 2), (2, 2)) for choice, _ in found.values())
