"""Candidates are judged as the cut model would be, and the search only ever gets nearer to the dense model."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from toys import toy
from transformers import PreTrainedModel

from edgeprune.allocation import judged as judged_rules
from edgeprune.allocation import search
from edgeprune.allocation.judged import rules
from edgeprune.budget import Cut, Problem, Widths, cut_evenly, cut_of, keep_list, removed
from edgeprune.calibration import Calibration
from edgeprune.candidates import Candidates, Effects
from edgeprune.journal import Journal
from edgeprune.pruning import Settings, apply_plan, judge, make_plan, make_problem, model_groups
from edgeprune.statistics import Stats
from edgeprune_runtime.errors import EdgepruneError

SETTINGS = Settings(0.15, method="wanda-sp", allocation="uniform:mixed", align=2, min_channels=4)


def calibrated(model: PreTrainedModel, sequences: int = 32) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (sequences, 12), generator=generator)
    return Calibration(ids, source="random tokens", sha256="0" * 64, seed=0)


def judged(name: str, journal: Journal | None = None) -> tuple[PreTrainedModel, Problem, Stats, Calibration]:
    model = toy(name)
    calibration = calibrated(model)
    _, stats = make_plan(model, "toy", calibration, SETTINGS, with_moments=True)
    problem = make_problem(model, model_groups(model), stats.scores, SETTINGS, stats.influence)
    judge_ = judge(model, calibration, SETTINGS, stats, journal=journal)
    return model, replace(problem, judge=judge_), stats, calibration


def divergence(dense: PreTrainedModel, cut: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        expected, found = (log_softmax(model(ids, use_cache=False).logits, -1) for model in (dense, cut))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def cut_model(
    model: torch.nn.Module, problem: Problem, cut: Cut, stats: Stats, calibration: Calibration
) -> torch.nn.Module:
    plan, _ = make_plan(model, "toy", calibration, SETTINGS)
    # the judge fits with one ridge and not on the tokens that judge, as a refit does that is given no others
    moments = {name: stats.moments[name].fitting() for name in stats.moments}
    smaller = copy.deepcopy(model)
    apply_plan(smaller, replace(plan, keep=keep_list(problem, cut)), moments)
    return smaller


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_divergence_is_that_of_the_refitted_and_cut_model(name: str) -> None:
    model, problem, stats, calibration = judged(name)
    cut = cut_evenly(problem, range(len(problem.layers)), same_widths=False)
    assert problem.judge is not None
    ids = calibration.ids[-4:]
    assert problem.judge.divergence(keep_list(problem, cut), slice(None)) == pytest.approx(
        divergence(model, cut_model(model, problem, cut, stats, calibration), ids), rel=1e-4
    )


def test_effects_predict_what_small_steps_do() -> None:
    _, problem, _, _ = judged("llama")
    assert problem.judge is not None
    cut = cut_evenly(problem, range(len(problem.layers)), same_widths=False)
    options: dict[int, Sequence[Widths]] = {}
    for i, (attention, channels) in cut.items():
        counts = problem.channel_counts(problem.layers[i])
        at = counts.index(channels)
        options[i] = [(attention, counts[at + 1]), (attention, counts[at - 1])]
    before = problem.judge.divergence(keep_list(problem, cut), slice(None))
    keeps = {i: [problem.layers[i].keep(*to) for to in of_layer] for i, of_layer in options.items()}
    predicted, found = [], []
    for i, effects in problem.judge.effects(keep_list(problem, cut), keeps, slice(None)).items():
        predicted += [effect.total for effect in effects]
        changed = [keep_list(problem, {**cut, i: option}) for option in options[i]]
        found += [problem.judge.divergence(keep, slice(None)) - before for keep in changed]
    correlation = float(torch.corrcoef(torch.tensor([predicted, found]))[0, 1])
    assert correlation > 0.8
    assert sum(map(abs, predicted)) == pytest.approx(sum(map(abs, found)), rel=0.5)


def test_an_option_that_changes_nothing_has_no_effect() -> None:
    _, problem, _, _ = judged("llama")
    assert problem.judge is not None
    cut = cut_evenly(problem, range(len(problem.layers)), same_widths=False)
    effects = problem.judge.effects(keep_list(problem, cut), {1: [problem.layers[1].keep(*cut[1])]}, slice(None))
    assert [abs(effect.total) < 1e-9 for effect in effects[1]] == [True]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("heads", ["auto", "keep"])
def test_search_is_at_least_as_near_as_its_starts_at_the_same_size(name: str, heads: str) -> None:
    _, problem, _, _ = judged(name)
    judge_ = problem.judge
    assert judge_ is not None
    problem = replace(problem, heads=heads)  # type: ignore[arg-type]
    if heads == "keep":
        problem = replace(problem, layers=[replace(layer, keeps_heads=True) for layer in problem.layers])
    starts = rules(problem)
    keep = search.allocate(problem, "3")
    cut = cut_of(problem, keep)
    largest = problem.align * max(map(problem.channel_cost, problem.layers))
    assert abs(removed(problem, cut) - problem.remove) <= largest
    nearest = min(judge_.divergence(keep_list(problem, start), judge_.accepting) for start in starts.values())
    assert judge_.divergence(keep, judge_.accepting) <= nearest
    if heads == "keep":
        assert all(
            attention == layer.attention_choices[0]
            for (attention, _), layer in zip(cut.values(), problem.layers, strict=True)
        )


@pytest.mark.parametrize("heads", ["auto", "even", "keep"])
def test_judged_takes_the_rule_whose_cut_is_nearest(heads: str) -> None:
    _, problem, _, _ = judged("llama")
    problem = replace(problem, heads=heads)  # type: ignore[arg-type]
    if heads == "keep":
        problem = replace(problem, layers=[replace(layer, keeps_heads=True) for layer in problem.layers])
    cuts = list(rules(problem).values())
    assert all(cuts.count(cut) == 1 for cut in cuts)
    judge_ = problem.judge
    assert judge_ is not None
    divergences = [judge_.divergence(keep_list(problem, cut), slice(None)) for cut in cuts]
    assert len(set(divergences)) > 1
    said: list[str] = []
    found = cut_of(problem, judged_rules.allocate(replace(problem, remark=said.append), None))
    best = divergences.index(min(divergences))
    assert found == cuts[best]
    (remark,) = said
    assert remark.startswith(f"widths of {list(rules(problem))[best]}: {min(divergences):.3f} nats per token from the")
    assert remark.count(";") == len(cuts) - 1


def test_rules_have_heads_that_compete_and_heads_that_give_an_even_share() -> None:
    _, problem, _, _ = judged("llama")
    auto, even = (list(rules(replace(problem, heads=heads)).values()) for heads in ("auto", "even"))
    assert even
    assert all(cut in auto for cut in even)
    assert len(auto) > len(even)


def test_judged_takes_the_scores_whose_cut_is_clearly_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, problem, stats, calibration = judged("llama")
    by_obs = make_plan(model, "toy", calibration, replace(SETTINGS, method="obs"), with_moments=True)[1].scores
    judge_ = problem.judge
    assert judge_ is not None
    found = judge_.scores("obs")
    assert found.keys() == by_obs.keys() == stats.scores.keys()
    assert all(torch.equal(found[name], by_obs[name]) for name in found)
    own, other = (
        min(judge_.divergence(keep_list(each, cut), slice(None)) for cut in rules(each).values())
        for each in (problem, problem.scored(by_obs))
    )
    said: list[str] = []
    for margin, wanted in ((0.0, min(own, other)), (1 - other / own - 1e-6, other), (1 - other / own + 1e-6, own)):
        monkeypatch.setattr(judged_rules, "MARGIN", margin)
        keep = judged_rules.allocate(replace(problem, remark=said.append), "obs")
        assert judge_.divergence(keep, slice(None)) == wanted
    remark = said[0]
    assert ", scores obs" in remark
    assert remark.count(";") == len(rules(problem)) + len(rules(problem.scored(by_obs))) - 1


def test_scores_that_are_compared_come_from_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [judged("llama", Journal(tmp_path))[1].judge.scores("obs")]  # type: ignore[union-attr]
    monkeypatch.setattr("edgeprune.candidates.moment_scores", lambda *_: pytest.fail("computed again"))
    scores.append(judged("llama", Journal(tmp_path))[1].judge.scores("obs"))  # type: ignore[union-attr]
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def test_cuts_that_are_the_same_by_other_scores_are_judged_once() -> None:
    model = toy("llama")
    plan, _ = make_plan(model, "toy", calibrated(model), replace(SETTINGS, method="obs", allocation="judged:obs,obs"))
    (note,) = (note for note in plan.notes if note.startswith("widths of "))
    assert "scores obs" not in note
    assert judged_rules.methods("obs,obs") == ["obs"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("3", "unknown importance method '3'"), ("obs,fisher", "scores of fisher, which reads gradients"), ("obs,", "''")],
)
def test_judged_refuses_scores_that_moments_do_not_tell(argument: str, message: str) -> None:
    with pytest.raises(EdgepruneError, match=message):
        Settings(0.2, allocation=f"judged:{argument}").check()


def test_make_plan_compares_scores() -> None:
    model = toy("llama")
    settings = replace(SETTINGS, method="taylor-coarse", allocation="judged:obs,magnitude")
    plan, _ = make_plan(model, "toy", calibrated(model), settings)
    (note,) = (note for note in plan.notes if note.startswith("widths of "))
    assert "scores obs" in note
    assert "scores magnitude" in note


def test_search_continues_from_its_journal(tmp_path: Path) -> None:
    _, problem, _, _ = judged("llama", Journal(tmp_path))
    keep = search.allocate(problem, "2")
    _, again, _, _ = judged("llama", Journal(tmp_path))
    assert again.judge is not None

    def forgotten(*_: object) -> None:
        raise AssertionError("computed again what the journal remembers")

    again.judge._forward = again.judge._dense_output = forgotten  # type: ignore[attr-defined]
    assert search.allocate(again, "2") == keep


def test_make_plan_searches() -> None:
    model = toy("llama")
    settings = replace(SETTINGS, allocation="search:1")
    plan, _ = make_plan(model, "toy", calibrated(model), settings)
    assert plan.allocation == "search:1"
    assert plan.ratio_reached == pytest.approx(SETTINGS.ratio, abs=0.01)


def test_too_few_sequences_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.pruning.gather", lambda *_, **__: pytest.fail("statistics were gathered"))
    with pytest.raises(EdgepruneError, match="--calibration-sequences to 16"):
        make_plan(toy("llama"), "toy", calibrated(toy("llama"), 15), replace(SETTINGS, allocation="search"))
    Settings(0.2, allocation="protect").check_sequences(1)
    Settings(0.2, allocation="judged").check_sequences(8)
    with pytest.raises(EdgepruneError, match=r"7 leave too few; raise --calibration-sequences to 8 .* protect"):
        Settings(0.2, allocation="judged").check_sequences(7)
    with pytest.raises(EdgepruneError, match=r"use --allocation protect --refit least-squares$"):
        Settings(0.2, allocation="judged", refit="reconstruct").check_sequences(7)


def test_one_sequence_kept_aside_judges_rules() -> None:
    model = toy("llama")
    plan, _ = make_plan(model, "toy", calibrated(model, 8), replace(SETTINGS, allocation="judged"))
    assert any(note.startswith("widths of ") for note in plan.notes)


def test_progress_names_the_round_and_goes_forward() -> None:
    model = toy("llama")
    said: list[tuple[str, int, int]] = []
    make_plan(
        model,
        "toy",
        calibrated(model),
        replace(SETTINGS, allocation="search:2"),
        progress=lambda stage, done, total: said.append((stage, done, total)),
    )
    judged_widths = [each for each in said if each[0].startswith("widths")]
    stages = list(dict.fromkeys(stage for stage, _, _ in judged_widths))
    assert stages[0] == "widths, rule 1 of 5 (uniform:mixed, heads auto)"
    assert "widths, round 1 of 2, steps" in stages
    assert "widths, round 1 of 2, candidate 1" in stages
    for stage in stages:
        counts = [(done, total) for each, done, total in judged_widths if each == stage]
        total = counts[0][1]
        assert counts == [(done, total) for done in range(total)]


def test_fitted_pieces_of_other_candidates_are_dropped() -> None:
    _, problem, _, _ = judged("llama")
    judge_ = problem.judge
    assert isinstance(judge_, Candidates)
    held = []
    effects = judge_.effects

    def counted(*arguments: Any) -> Effects:
        found = effects(*arguments)
        held.append(len(judge_._fitted))
        return found

    judge_.effects = counted  # type: ignore[method-assign]
    search.allocate(problem, "4")
    # of each layer: the widths as they are, 2 steps of the channels, up to 4 of the attention
    assert len(held) > 1
    assert max(held) <= len(problem.layers) * ((1 + 2) + (1 + 4))


@pytest.mark.parametrize("argument", ["0", "x", "0min", "-1", "1.5", "min"])
def test_a_budget_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(EdgepruneError, match="expected a number of rounds"):
        search.check(argument, "auto")


def test_minutes_are_a_budget() -> None:
    search.check("10min", "auto")
    assert search.budget("2min") == (1000, 120.0)
