"""Every importance method against a slow literal version of its formula."""

import itertools
import statistics
from dataclasses import replace

import pytest
import torch
from toys import toy

from edgeprune import plugins
from edgeprune.groups import Group, Slot
from edgeprune.importance import Evidence, SlotEvidence, fisher, flap, fusion, obs
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
    x = rows(50, channels) @ rows(channels, channels) + rows(channels)
    weights, gradients = ([rows(channels, WIDTH) for _ in range(2)] for _ in "ab")
    slots = [
        SlotEvidence(
            slot=Slot(name, side, SIZE),
            weight=weight,
            gradient=gradient,
            effect=(weight * gradient).sum(1),
            fisher=rows(channels, WIDTH).square(),
            **(
                {"input_sq_mean": x.square().mean(0), "input_mean": x.mean(0), "gram": x.T @ x / len(x)}
                if side == "in"
                else {}
            ),
        )
        for name, side, weight, gradient in zip(("q_proj", "o_proj"), ("out", "in"), weights, gradients, strict=True)
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
                elif method == "flap" and slot.slot.side == "in":
                    variance = float(slot.input_sq_mean[channel]) - float(slot.input_mean[channel]) ** 2
                    total += (variance * sum(a * a for a in w)) ** 2 / SIZE
                elif method == "taylor-coarse":
                    total += abs(sum(a * b for a, b in zip(w, g, strict=True)))
                elif method == "taylor-fine":
                    total += sum(abs(a * b) for a, b in zip(w, g, strict=True))
                elif method == "taylor-mixed":
                    total += sum(abs(a * b - 0.5 * a * a * c) for a, b, c in zip(w, g, f, strict=True))
        found.append(total)
    return found


@pytest.mark.parametrize("name", ["magnitude", "wanda-sp", "flap", "taylor-coarse", "taylor-fine", "taylor-mixed"])
def test_scores_equal_the_literal_formula(name: str, evidence: Evidence) -> None:
    scores = Method.parse(name).scores(GROUP, evidence)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(literal(evidence, name)))


def test_every_method_has_a_test_here() -> None:
    tested = {
        "magnitude",
        "wanda-sp",
        "flap",
        "taylor-coarse",
        "taylor-fine",
        "taylor-mixed",
        "fusion",
        "obs",
        "random",
        "fisher",
    }
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


@pytest.mark.parametrize(
    "name", ["taylor-fine", "magnitude", "wanda-sp", "taylor-coarse", "taylor-mixed", "flap", "obs"]
)
def test_a_method_that_takes_no_argument_refuses_one(name: str, evidence: Evidence) -> None:
    with pytest.raises(EdgepruneError, match="takes no argument"):
        Method.parse(f"{name}:3")


def channel_evidence(channels: int = 60, width: int = 7, seed: int = 2) -> tuple[Group, Evidence, torch.Tensor]:
    """A down_proj on correlated inputs; the third value is the inputs themselves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    slot = Slot("down_proj", "in", 1)
    weight = torch.randn(channels, width, generator=generator)
    known = SlotEvidence(slot, weight, input_sq_mean=x.square().mean(0), input_mean=x.mean(0), gram=x.T @ x / len(x))
    return Group("layers.0.channels", "channels", 0, channels, (slot,)), Evidence((known,)), x


def test_flap_scores_channels_by_the_variance_of_what_they_add() -> None:
    group, evidence, x = channel_evidence()
    expected = x.var(0, correction=0) * evidence.slots[0].weight.square().sum(1)
    torch.testing.assert_close(flap.scores(group, evidence, None), expected, rtol=1e-3, atol=1e-3)


def test_a_channel_that_is_constant_does_not_fluctuate() -> None:
    group, evidence, _ = channel_evidence()
    mean = evidence.slots[0].input_sq_mean.sqrt() * 1.0001  # rounding must not make a variance negative
    constant = Evidence((replace(evidence.slots[0], input_mean=mean),))
    assert torch.equal(flap.scores(group, constant, None), torch.zeros(60))


def refitted_error(reader: SlotEvidence, gone: set[int], damping: float = obs.DAMPING) -> float:
    """Least error of the outputs without these columns, the rest refitted: `min tr(E H E^T)` over all such E."""
    gram = reader.gram.double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    kept = [column for column in range(len(gram)) if column not in gone]
    change = reader.weight.double().clone()
    if kept:
        change[kept] -= torch.linalg.solve(gram[kept][:, kept], gram[kept] @ reader.weight.double())
    return float((change.T @ gram @ change).trace())


def columns_of(units: set[int], size: int) -> set[int]:
    return {unit * size + column for unit in units for column in range(size)}


def literal_removal(reader: SlotEvidence, size: int, rounds: tuple[int, ...]) -> tuple[list[set[int]], list[float]]:
    """Greedy removal in rounds, every error from a refit of its own: what is gone after each round, and its error."""
    gone: set[int] = set()
    found, errors = [], []
    for count in rounds:
        left = [unit for unit in range(len(reader.gram) // size) if unit not in gone]
        gone = gone | set(sorted(left, key=lambda u: refitted_error(reader, columns_of(gone | {u}, size)))[:count])
        found.append(gone)
        errors.append(refitted_error(reader, columns_of(gone, size)))
    return found, errors


def test_obs_removes_heads_one_by_one_as_refits_of_every_candidate_would(evidence: Evidence) -> None:
    reader = evidence.inner
    removal = obs.remove_greedily(reader.weight, reader.gram, SIZE)
    gone, errors = literal_removal(reader, SIZE, removal.rounds)
    assert removal.rounds == (1,) * UNITS
    assert [set(removal.order[: n + 1].tolist()) for n in range(UNITS)] == gone
    assert removal.errors.cumsum(0).tolist() == pytest.approx(errors, rel=1e-5)
    scores = obs.scores(GROUP, evidence, None)
    assert scores.argsort(stable=True).tolist() == removal.order.tolist()


@pytest.mark.parametrize("channels", [60, 25, 7, 1])
def test_obs_removes_channels_in_rounds_whose_errors_are_those_of_refits(channels: int) -> None:
    group, evidence, _ = channel_evidence(channels)
    reader = evidence.inner
    removal = obs.remove_greedily(reader.weight, reader.gram, 1)
    gone, errors = literal_removal(reader, 1, removal.rounds)
    assert sum(removal.rounds) == channels
    assert len(removal.rounds) <= obs.ROUNDS
    at = list(itertools.accumulate(removal.rounds))
    assert [set(removal.order[:n].tolist()) for n in at] == gone
    curve = removal.errors.cumsum(0)[[n - 1 for n in at]]
    assert curve.tolist() == pytest.approx(errors, rel=1e-5)

    scores = obs.scores(group, evidence, None)
    assert scores.argsort(stable=True).tolist() == removal.order.tolist()
    assert len(set(scores.tolist())) == channels
    envelope = scores.double().sort().values.cumsum(0)[[n - 1 for n in at]]
    assert (envelope >= curve * (1 - 1e-6)).all()
    assert float(envelope[-1]) <= 1.2 * errors[-1]
    energy = refitted_error(reader, set(range(channels)))
    assert errors[-1] == pytest.approx(energy)


def test_obs_finds_that_a_twin_can_go() -> None:
    group, evidence, x = channel_evidence(12)
    x[:, 5] = 2 * x[:, 3]  # either can make up for the other, but not both for each other
    twin = Evidence((replace(evidence.inner, gram=x.T @ x / len(x)),))
    order = obs.scores(group, twin, None).argsort().tolist()
    assert order[0] in (3, 5)
    assert {3, 5} != set(order[:2])


def kv_evidence(evidence: Evidence) -> tuple[Group, Evidence]:
    """Two KV heads, each read by two of the four query heads."""
    slot = Slot("k_proj", "out", SIZE)
    group = Group("layers.0.kv_heads", "kv_heads", 0, 2, (slot,))
    known = SlotEvidence(slot, torch.zeros(2 * SIZE, WIDTH))
    return group, Evidence((known,), dependants=evidence.slots)


def test_obs_scores_a_kv_head_so_that_it_costs_the_joint_error_of_its_query_heads(evidence: Evidence) -> None:
    group, of_kv = kv_evidence(evidence)
    scores = obs.scores(group, of_kv, None) + obs.scores(GROUP, evidence, None).reshape(2, 2).sum(1)
    first, second = scores.argsort().tolist()
    reader = evidence.inner
    assert float(scores[first]) == pytest.approx(refitted_error(reader, columns_of({first}, 2 * SIZE)), rel=1e-4)
    assert refitted_error(reader, columns_of({first}, 2 * SIZE)) <= refitted_error(
        reader, columns_of({second}, 2 * SIZE)
    )


def test_fisher_is_half_of_the_mask_information() -> None:
    scores = fisher.scores(GROUP, Evidence((), mask_fisher=torch.tensor([4.0, 0.0, 1.0, 3.0]).double()), None)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [2.0, 0.0, 0.5, 1.5]


def test_fisher_of_a_kv_head_is_what_its_query_heads_cost_more_together(evidence: Evidence) -> None:
    group, of_kv = kv_evidence(evidence)
    effects = torch.randn(2, 30, UNITS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    effects[:, :, 3] = -effects[:, :, 2]  # these two cancel
    single = effects.square().mean((0, 1))
    joint = effects.reshape(2, 30, 2, 2).sum(3).square().mean((0, 1))
    heads = fisher.scores(GROUP, Evidence((), mask_fisher=single), None).reshape(2, 2).sum(1)
    scores = fisher.scores(group, replace(of_kv, mask_fisher=joint, dependants_mask_fisher=single), None)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores + heads, torch.maximum(joint / 2, heads.double()).float())
    assert float(scores[1]) == 0.0


def test_obs_of_inputs_that_are_all_zero_is_almost_nothing() -> None:
    group, evidence, _ = channel_evidence(9)
    nothing = Evidence((replace(evidence.inner, gram=torch.zeros(9, 9)),))
    scores = obs.scores(group, nothing, None)
    assert torch.isfinite(scores).all()
    assert scores.max() < 1e-30


@pytest.mark.parametrize("tokens", [1, 5])
def test_obs_of_a_singular_gram_matrix_is_finite(tokens: int) -> None:
    group, evidence, x = channel_evidence(30)
    x = x[:tokens]
    x[:, 4] = 0.0
    scores = obs.scores(group, Evidence((replace(evidence.inner, gram=x.T @ x / tokens),)), None)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_obs_of_inputs_that_are_not_finite_is_refused(value: float) -> None:
    group, evidence, _ = channel_evidence(9)
    gram = evidence.inner.gram.clone()
    gram[2, 3] = gram[3, 2] = value
    with pytest.raises(EdgepruneError, match="finite"):
        obs.scores(group, Evidence((replace(evidence.inner, gram=gram),)), None)


def test_random_scores_depend_on_the_seed_and_the_group_alone() -> None:
    method, other = Method.parse("random:7"), replace(GROUP, name="layers.1.heads")
    scores = method.scores(GROUP, Evidence(()))
    assert torch.equal(scores, method.scores(GROUP, Evidence(())))
    assert not torch.equal(scores, method.scores(other, Evidence(())))
    assert not torch.equal(scores, Method.parse("random:8").scores(GROUP, Evidence(())))
    assert torch.equal(
        Method.parse("random").scores(GROUP, Evidence(())), Method.parse("random:0").scores(GROUP, Evidence(()))
    )
    many = method.scores(replace(GROUP, units=4000), Evidence(()))
    assert 0.47 < float(many.mean()) < 0.53


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", "9999999999", "²"])
def test_random_refuses_what_is_no_seed(seed: str) -> None:
    with pytest.raises(EdgepruneError, match="seed"):
        Method.parse(f"random:{seed}")


@pytest.mark.parametrize("toy_name", ["llama", "llama-mha", "qwen2"])
@pytest.mark.parametrize("name", ["obs", "flap", "random", "fisher"])
def test_methods_score_every_group_of_a_model(toy_name: str, name: str) -> None:
    model = toy(toy_name)
    groups = model_groups(model)
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    scores = gather(model, groups, ids, Method.parse(name)).scores
    for group in groups:
        assert scores[group.name].shape == (group.units,)
        assert scores[group.name].dtype == torch.float32
        if group.kind == "kv_heads" and toy_name == "llama-mha":
            assert name == "random" or not scores[group.name].any()
