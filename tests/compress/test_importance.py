"""Every importance method against a slow literal version of its formula."""

import statistics
from dataclasses import replace

import pytest
import torch
from toys import toy

from edgeprune import plugins
from edgeprune.groups import Group, Slot
from edgeprune.importance import Evidence, SlotEvidence, fusion
from edgeprune.pruning import model_groups
from edgeprune.statistics import Method, gather
from edgeprune_runtime.errors import EdgepruneError

UNITS, SIZE, WIDTH = 4, 3, 5


@pytest.fixture
def evidence() -> Evidence:
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels = UNITS * SIZE
    slots = [
        SlotEvidence(
            slot=Slot(name, side, SIZE),
            weight=rows(channels, WIDTH),
            gradient=rows(channels, WIDTH),
            fisher=rows(channels, WIDTH).square(),
            input_sq_mean=rows(channels).square() if side == "in" else None,
        )
        for name, side in (("q_proj", "out"), ("o_proj", "in"))
    ]
    return Evidence(tuple(slots))


GROUP = Group("layers.0.heads", "heads", 0, UNITS, (Slot("q_proj", "out", SIZE), Slot("o_proj", "in", SIZE)))


def literal(evidence: Evidence, method: str) -> list[float]:
    """The papers' formulas, weight by weight."""
    found = []
    for unit in range(UNITS):
        total = 0.0
        for slot in evidence.slots:
            for channel in range(unit * SIZE, (unit + 1) * SIZE):
                w, g, f = (x[channel].tolist() for x in (slot.weight, slot.gradient, slot.fisher))
                if method == "magnitude":
                    total += sum(a * a for a in w)
                elif method == "wanda-sp" and slot.slot.side == "in":
                    total += sum(abs(a) for a in w) / WIDTH * float(slot.input_sq_mean[channel]) ** 0.5
                elif method == "taylor-coarse":
                    total += abs(sum(a * b for a, b in zip(w, g, strict=True)))
                elif method == "taylor-fine":
                    total += sum(abs(a * b) for a, b in zip(w, g, strict=True))
                elif method == "taylor-mixed":
                    total += sum(abs(a * b - 0.5 * a * a * c) for a, b, c in zip(w, g, f, strict=True))
        found.append(total)
    return found


@pytest.mark.parametrize("name", ["magnitude", "wanda-sp", "taylor-coarse", "taylor-fine", "taylor-mixed"])
def test_scores_equal_the_literal_formula(name: str, evidence: Evidence) -> None:
    scores = Method.parse(name).scores(GROUP, evidence)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(literal(evidence, name)))


def test_every_method_has_a_test_here() -> None:
    tested = {"magnitude", "wanda-sp", "taylor-coarse", "taylor-fine", "taylor-mixed", "fusion"}
    assert set(plugins.names("importance")) == tested


@pytest.mark.parametrize(("share", "single"), [("1", "taylor-coarse"), ("0", "taylor-fine")])
def test_the_ends_of_a_fixed_fusion_are_the_single_estimates_exactly(
    share: str, single: str, evidence: Evidence
) -> None:
    fused = Method.parse(f"fusion:{share}").scores(GROUP, evidence)
    assert torch.equal(fused, Method.parse(single).scores(GROUP, evidence))


def sampled_evidence(evidence: Evidence, samples: int = 5) -> Evidence:
    generator = torch.Generator().manual_seed(4)
    return replace(
        evidence, samples={name: torch.rand(samples, UNITS, generator=generator) for name in fusion.ESTIMATES}
    )


def test_attention_fusion_equals_its_formula(evidence: Evidence) -> None:
    evidence = sampled_evidence(evidence)
    coarse, fine = (evidence.samples[name].mean(0) for name in fusion.ESTIMATES)
    c, f = coarse / coarse.mean(), fine / fine.mean()
    query = (c + f) / 2
    keys = torch.stack([sum(query * c), sum(query * f)]) / UNITS
    lam_c, lam_f = (keys.exp() / keys.exp().sum()).tolist()
    expected = fine.mean() * (lam_c * c + lam_f * f)
    torch.testing.assert_close(Method.parse("fusion:attention").scores(GROUP, evidence), expected)


def test_adaptive_fusion_blends_the_means_over_the_samples(evidence: Evidence) -> None:
    evidence = sampled_evidence(evidence)
    coarse, fine = (evidence.samples[name] for name in fusion.ESTIMATES)
    lam_c = fusion.inverse_variance_weight(coarse, fine)
    c, f = coarse.mean(0), fine.mean(0)
    expected = f.mean() * (lam_c * c / c.mean() + (1 - lam_c) * f / f.mean())
    torch.testing.assert_close(Method.parse("fusion").scores(GROUP, evidence), expected)


def test_attention_leans_to_the_estimate_that_tells_units_apart() -> None:
    flat, sharp = torch.ones(2, 8), torch.tensor([0.01] * 7 + [8.0]).repeat(2, 1)
    assert fusion.attention_weight(sharp, flat) > 0.5 > fusion.attention_weight(flat, sharp)
    assert fusion.attention_weight(flat, flat) == pytest.approx(0.5)


def test_inverse_variance_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    coarse, fine = torch.rand(10, 6, generator=generator), 5 + torch.rand(10, 6, generator=generator)
    variances = []
    for samples in (coarse, fine):
        relative = [[value / (sum(row) / 6) for value in row] for row in samples.tolist()]
        columns = list(zip(*relative, strict=True))
        variances.append(sum(statistics.variance(column) for column in columns) / 6)
    expected = (1 / variances[0]) / (1 / variances[0] + 1 / variances[1])
    assert fusion.inverse_variance_weight(coarse, fine) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.1


def test_inverse_variance_gives_all_to_an_estimate_that_never_wavers() -> None:
    steady = torch.arange(1.0, 7.0).repeat(10, 1)
    noisy = torch.rand(10, 6, generator=torch.Generator().manual_seed(1))
    assert fusion.inverse_variance_weight(steady, noisy) == 1.0
    assert fusion.inverse_variance_weight(noisy, steady) == 0.0
    assert fusion.inverse_variance_weight(steady, steady) == 0.5


def test_inverse_variance_needs_two_samples() -> None:
    with pytest.raises(EdgepruneError, match="at least 2"):
        fusion.inverse_variance_weight(torch.ones(1, 4), torch.ones(1, 4))


def test_inverse_variance_runs_on_samples_of_a_model() -> None:
    model = toy("llama")
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    stats = gather(model, model_groups(model), ids, Method.parse("fusion:inverse-variance"))
    single = gather(model, model_groups(model), ids, Method.parse("taylor-fine"))
    assert any(not torch.equal(stats.scores[name], single.scores[name]) for name in stats.scores)


def test_an_estimate_that_is_all_zero_leaves_the_other() -> None:
    scores = torch.tensor([1.0, 2.0])
    assert torch.equal(fusion.fuse(torch.zeros(2), scores, 0.5), scores)


@pytest.mark.parametrize("mode", ["magic", "1.5", "nan", "-0.1"])
def test_an_unknown_fusion_mode_is_refused_at_once(mode: str) -> None:
    with pytest.raises(EdgepruneError, match="fusion mode"):
        Method.parse(f"fusion:{mode}")


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(EdgepruneError, match="did you mean 'fusion'"):
        Method.parse("fussion")


@pytest.mark.parametrize("name", ["taylor-fine", "magnitude", "wanda-sp", "taylor-coarse", "taylor-mixed"])
def test_a_method_that_takes_no_argument_refuses_one(name: str, evidence: Evidence) -> None:
    with pytest.raises(EdgepruneError, match="takes no argument"):
        Method.parse(f"{name}:3")
