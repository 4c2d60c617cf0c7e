"""Every importance method with every allocation and every refit, from a model to a cut one."""

import contextlib
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import KINDS, toy
from trained import stories

from edgeprune import plugins
from edgeprune.calibration import Calibration
from edgeprune.checkpoint import load_pruned, save
from edgeprune.groups import layer_widths
from edgeprune.pruning import RATIO_TOLERANCE, Settings, allocate, apply_plan, judge, make_plan, model_groups
from edgeprune_runtime.errors import EdgepruneError

METHODS, ALLOCATIONS = plugins.names("importance"), plugins.names("allocation")
MODES = ("none", "bias", "least-squares", "intercept")


def calibration(ids: torch.Tensor) -> Calibration:
    return Calibration(ids, "test", 0, "")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_allocation_and_refit_gives_a_model_that_computes(method: str) -> None:
    model = toy("llama", intermediate_size=160, num_hidden_layers=6)
    tokens = calibration(torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(1)))
    settings = Settings(0.2, method=method, align=4, min_channels=8, gradient_sequences=4)
    plan, stats = make_plan(copy.deepcopy(model), "toy", tokens, settings)
    for i, allocation in enumerate(ALLOCATIONS):
        of_this = replace(settings, allocation=allocation)
        judge_of = partial(judge, model, calibration=tokens, settings=of_this, stats=stats)
        keep = allocate(model, model_groups(model), stats.scores, of_this, stats.influence, judge_of)
        smaller = copy.deepcopy(model)
        apply_plan(smaller, replace(plan, keep=keep, refit=MODES[i % len(MODES)]), stats.moments)
        assert torch.isfinite(smaller(tokens.ids).logits).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("method", "allocation"), [("fusion", "protect:1,1"), ("obs", "search"), ("flap", "global")])
def test_every_kind_of_block_is_pruned_saved_and_read_back(
    method: str, allocation: str, name: str, tmp_path: Path
) -> None:
    model = toy(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    tokens = calibration(torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(1)))
    settings = Settings(0.2, method, allocation, align=1, min_channels=4, gradient_sequences=4)
    with contextlib.suppress(EdgepruneError):  # where the architecture has room for intercepts
        replace(settings, refit="intercept").check_for(model.config.model_type)
        settings = replace(settings, refit="intercept")
    plan, stats = make_plan(model, "toy", tokens, settings)
    groups = model_groups(model)
    apply_plan(model, plan, stats.moments)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert after == plan.parameters_after
    assert abs(1 - after / before - 0.2) <= RATIO_TOLERANCE
    save(model, None, plan, layer_widths(groups, plan.keep), tmp_path / "out")
    assert torch.equal(load_pruned(tmp_path / "out")(tokens.ids).logits, model(tokens.ids).logits)


def test_plan_says_where_nobody_could_judge_the_refit() -> None:
    for sequences, refit, is_said in ((4, "least-squares", True), (8, "least-squares", False), (4, "none", False)):
        tokens = calibration(torch.randint(3, 97, (sequences, 12), generator=torch.Generator().manual_seed(1)))
        plan, _ = make_plan(toy("llama"), "toy", tokens, Settings(0.2, align=4, min_channels=8, refit=refit))
        assert any("nobody judged the refit" in note for note in plan.notes) == is_said


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor) -> float:
    return sum(float(model(rows, labels=rows).loss) for rows in ids.split(16)) / len(ids.split(16))


@pytest.fixture(scope="module")
def trained(stories260k: Path, data_folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor, float]:
    """A trained model, text to fit and to judge it on, and its loss on the latter. Read only."""
    model, fitting, judging = stories(stories260k, data_folder)
    return model, fitting, judging, loss(model, judging)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_on_a_trained_model_each_part_of_the_refit_wins_something_back(
    method: str, trained: tuple[Any, torch.Tensor, torch.Tensor, float]
) -> None:
    model, fitting, judging, dense_loss = trained
    settings = Settings(0.2, method=method, allocation="knapsack", align=4, min_channels=16)
    plan, stats = make_plan(copy.deepcopy(model), "stories", calibration(fitting), settings)
    losses = {}
    for mode in MODES:
        smaller = copy.deepcopy(model)
        apply_plan(smaller, replace(plan, refit=mode), stats.moments)
        losses[mode] = loss(smaller, judging)
    assert losses["least-squares"] < losses["bias"] < losses["none"]
    assert losses["intercept"] < losses["least-squares"] + 0.02
    assert losses["intercept"] > dense_loss
