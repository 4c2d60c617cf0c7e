"""Recovery: its gradients are those of the whole model, what is merged says the same, and only what helps is taken."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from toys import KINDS, toy
from trained import stories

from edgeprune import recover as recovering
from edgeprune.calibration import Calibration
from edgeprune.journal import Journal
from edgeprune.plan import PrunePlan
from edgeprune.pruning import Settings, apply_plan, make_plan
from edgeprune.recover import Recovery, ask_teacher, parse_recover, recover
from edgeprune.shrink import Linear
from edgeprune.statistics import Stats
from edgeprune.streaming import Decoder
from edgeprune_runtime.errors import EdgepruneError

pytest.importorskip("peft", reason="needs the recover extra")


def calibration(sequences: int = 16, length: int = 24) -> Calibration:
    ids = torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Calibration(ids, "test", 0, "")


def planned(model: Any, tokens: Calibration) -> tuple[PrunePlan, Stats]:
    return make_plan(model, "toy", tokens, Settings(0.2, align=4, min_channels=8, allocation="uniform", refit="none"))


def recovered(
    model: Any, tokens: Calibration, passes: int = 20, journal: Journal | None = None, **options: Any
) -> Recovery:
    """Cut a model and train it, in place."""
    journal = journal or Journal()
    plan, stats = planned(model, tokens)
    ask_teacher(model, tokens, journal, **options)
    apply_plan(model, plan, stats.moments, journal=journal)
    return recover(model, passes, tokens, journal, **options)


def divergence(dense: Any, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """KL(dense || model) by one call of each whole model."""
    expected, found = (log_softmax(each(ids, use_cache=False).logits.flatten(0, 1), -1) for each in (dense, model))
    return kl_div(found, expected.detach(), reduction="sum", log_target=True) / ids.numel()


class _Watching(torch.optim.AdamW):
    """Remembers the gradients of every step."""

    seen: list[list[torch.Tensor]]

    def step(self, closure: Any = None) -> Any:
        self.seen.append([weight.grad.clone() for group in self.param_groups for weight in group["params"]])
        return super().step(closure)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_gradients_are_those_of_the_whole_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's gradients, against autograd through a model that calculates W + B A by itself."""
    monkeypatch.setattr("edgeprune.streaming.LOGIT_BYTES", 4 * 4 * 97 * 10)  # logits in pieces of few tokens
    monkeypatch.setattr(torch.optim, "AdamW", _Watching)
    monkeypatch.setattr(_Watching, "seen", [], raising=False)
    dense, tokens = toy(name), calibration()
    model = copy.deepcopy(dense)
    journal = Journal()
    plan, stats = planned(model, tokens)
    ask_teacher(model, tokens, journal)
    apply_plan(model, plan, stats.moments, journal=journal)
    cut = copy.deepcopy(model)
    recover(model, 1, tokens, journal)  # one step, of all sequences that are not kept aside

    blocks = Decoder.of(cut).blocks
    with recovering._adapters(blocks) as adapters:  # same seed, same adapters
        divergence(dense, cut, tokens.ids[:14]).backward()
        expected = [weight.grad for weight in adapters.values()]
    (found,) = _Watching.seen
    assert any(gradient.abs().max() > 1e-4 for gradient in found)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_every_family_comes_nearer_to_the_dense_model_by_its_linears_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovering, "LEARNING_RATE", 5e-3)
    dense, tokens = toy(name), calibration()
    model, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    plan, stats = planned(dense, tokens)
    apply_plan(cut, plan, stats.moments)
    found = recovered(model, tokens, passes=6)
    with torch.no_grad():
        before, after = (float(divergence(dense, each, tokens.ids[14:])) for each in (cut, model))
    assert found.is_accepted
    assert found.divergence_before == pytest.approx(before, rel=1e-3)
    assert found.divergence == pytest.approx(after, rel=1e-3)
    assert after < before
    linears = {
        f"{module_name}.weight"
        for module_name, module in cut.named_modules()
        if isinstance(module, Linear) and module_name.startswith(Decoder.of(cut).blocks_name)
    }
    stayed = cut.state_dict()
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, stayed[key])} == linears


def test_what_a_reconstruction_has_fitted_does_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sequences kept aside one holds enough tokens to judge; a reconstruction fits the other one too."""
    dense, tokens = toy("llama"), calibration()
    monkeypatch.setattr("edgeprune.reconstruct.JUDGED_TOKENS", tokens.ids.shape[1])
    model, cut = copy.deepcopy(dense), copy.deepcopy(dense)
    plan, stats = planned(dense, tokens)
    apply_plan(cut, plan, stats.moments)
    found = recovered(model, tokens, passes=1)
    with torch.no_grad():
        before = float(divergence(dense, cut, tokens.ids[15:]))
    assert found.divergence_before == pytest.approx(before, rel=1e-3)


def test_what_does_not_help_on_the_sequences_kept_aside_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate in (50.0, 1e30):
        monkeypatch.setattr(recovering, "LEARNING_RATE", rate)
        tokens, model = calibration(), toy("llama")
        cut = copy.deepcopy(model)
        plan, stats = planned(model, tokens)
        apply_plan(cut, plan, stats.moments)
        found = recovered(model, tokens, passes=3)
        assert not found.is_accepted
        assert found.divergence is None or found.divergence > found.divergence_before
        for one, other in zip(model.parameters(), cut.parameters(), strict=True):
            assert torch.equal(one, other)
    assert found.divergence is None


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_stored_half_precision_stays(products: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovering, "LEARNING_RATE", 5e-3)
    tokens = calibration()
    for name in ("llama", "gpt2"):
        model = toy(name).to(torch.bfloat16)
        assert recovered(model, tokens, passes=10, dtype=products).is_accepted
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(model(tokens.ids).logits).all()


def test_sequences_that_judge_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, other = calibration(), calibration()
    other.ids[14:] = 5
    weights = []
    for each in (tokens, other):
        model = toy("llama")
        plan, stats = planned(model, tokens)
        journal = Journal()
        ask_teacher(model, each, journal)
        apply_plan(model, plan, stats.moments, journal=journal)
        answers = iter((2.0, 1.0))
        monkeypatch.setattr(recovering._Student, "judged", lambda _, answers=answers: next(answers))
        assert recover(model, 2, each, journal).is_accepted
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    recovered(toy("llama"), calibration(), passes=1)
    assert torch.equal(state, torch.get_rng_state())


class _DiesAfter(Journal):
    """A journal of a run that is interrupted once a step has been put so often."""

    def __init__(self, folder: Path, step: str, times: int) -> None:
        super().__init__(folder)
        self._step, self._times = step, times

    def put(self, name: str, entry: Any) -> None:
        super().put(name, entry)
        self._times -= name == self._step
        if not self._times:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("step", "times"),
    [("teacher-1", 1), ("before-recover", 1), ("adapters", 1), ("adapters", 3), ("recover-1", 1), ("recover", 1)],
)
def test_interrupted_recovery_continues_to_the_same_weights(step: str, times: int, tmp_path: Path) -> None:
    tokens = calibration()
    expected = toy("llama")
    outcome = recovered(expected, tokens, passes=20)
    (tmp_path / "work").mkdir()
    with pytest.raises(KeyboardInterrupt):
        recovered(toy("llama"), tokens, journal=_DiesAfter(tmp_path / "work", step, times))
    model, journal = toy("llama"), Journal(tmp_path / "work")
    decoder = Decoder.of(model)
    assert recovered(decoder, tokens, journal=journal) == outcome
    with decoder.whole() as found:
        for one, other in zip(found.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)
    left = {path.stem for path in (tmp_path / "work").iterdir()}
    assert not {each for each in left if each.startswith(("teacher", "before", "adapters"))}


@pytest.mark.slow
def test_on_a_trained_model_it_wins_what_the_refit_leaves(stories260k: Path, data_folder: Path) -> None:
    dense, fitting, judging = stories(stories260k, data_folder)
    model, journal, text = copy.deepcopy(dense), Journal(), Calibration(fitting, "stories", 0, "")
    settings = Settings(0.2, allocation="uniform", align=4, min_channels=16, refit="least-squares")
    plan, stats = make_plan(model, "stories", text, settings)
    ask_teacher(model, text, journal)
    apply_plan(model, plan, stats.moments, text, journal=journal)
    with torch.no_grad():
        before = float(divergence(dense, model, judging))
    found = recover(model, 1, text, journal)
    with torch.no_grad():
        after = float(divergence(dense, model, judging))
    assert found.is_accepted
    assert found.divergence is not None
    assert found.divergence < 0.95 * found.divergence_before
    assert after < 0.95 * before


def test_passes_are_read_and_wrong_ones_refused() -> None:
    assert [parse_recover(text) for text in ("none", "lora", "lora:1", "lora:12")] == [0, 1, 1, 12]
    for text in ("foo", "lora:0", "lora:x", "lora:", "lora:-1", "lora:1001", "none:2", "", "lora:٣"):
        with pytest.raises(EdgepruneError, match=r"was not understood; expected none, lora, or lora:PASSES"):
            Settings(0.2, recover=text).check()


def test_too_few_sequences_to_judge_on_are_refused_before_any_work() -> None:
    settings = Settings(0.2, recover="lora", refit="none")
    settings.check_sequences(8)
    with pytest.raises(EdgepruneError, match="7 leave none; raise --calibration-sequences to 8 or more, or use --rec"):
        settings.check_sequences(7)


def test_the_plan_says_it() -> None:
    tokens = calibration()
    plan, _ = make_plan(toy("llama"), "toy", tokens, Settings(0.2, align=4, min_channels=8, recover="lora:2"))
    assert PrunePlan.from_json(plan.to_json()).recover == "lora:2"
    assert plan.summary()["recover"] == "lora:2"
