"""Every sparsity method against a slow literal version of its formula."""

from dataclasses import replace

import pytest
import torch

from edgeprune import plugins
from edgeprune.groups import Side
from edgeprune.patterns import Pattern
from edgeprune.sparsity import Evidence, alps, dass, magnitude, sparsegpt, wanda
from edgeprune_runtime.errors import EdgepruneError

ROWS, COLUMNS, TOKENS = 12, 22, 90
PATTERNS = ["2:4", "1:4", "4:8", "7:16", "0.5", "0.3"]
DAMPING = 0.01


def evidence(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Evidence:
    """Inputs of very different sizes that hang together, so that every method has a choice of its own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.randn(columns, generator=generator).exp()
    x = torch.randn(TOKENS + columns, columns, generator=generator) @ mix * sizes
    return Evidence(
        weight=torch.randn(rows, columns, generator=generator),
        input_sq_mean=x.square().mean(0),
        gram=x.T @ x / len(x),
        channel_sq_mean=torch.randn(rows, generator=generator).exp(),
    )


def blocks_of(pattern: Pattern, count: int) -> list[range]:
    """Neighbours that compete; without blocks all of a line."""
    size = pattern.block_m or count
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def literal(scores: list[list[float]], weight: torch.Tensor, pattern: Pattern, side: Side = "in") -> torch.Tensor:
    """The weight without the smallest scores of each block, or of each line."""
    if side == "out":
        return literal([list(column) for column in zip(*scores, strict=True)], weight.T, pattern).T
    found = weight.clone()
    for row, of_row in enumerate(scores):
        for block in blocks_of(pattern, len(of_row)):
            zeros = len(block) - pattern.keep_n if pattern.block_m else int(pattern.sparsity * len(block))
            for column in sorted(block, key=lambda column, of_row=of_row: of_row[column])[: max(0, zeros)]:
                found[row, column] = 0.0
    return found


def wanda_scores(given: Evidence) -> list[list[float]]:
    """`|W_ij| * ||x_j||`, with the norm over some number of tokens: it makes no difference to the order."""
    norms = [(TOKENS * float(square)) ** 0.5 for square in given.input_sq_mean]
    return [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in given.weight.tolist()]


def test_every_method_has_a_test_here() -> None:
    assert set(plugins.names("sparsity")) <= {"alps", "dass", "magnitude", "sparsegpt", "wanda"}


@pytest.mark.parametrize("text", [text for text in PATTERNS if ":" in text])
def test_magnitude_drops_the_smallest_of_a_block(text: str) -> None:
    given, pattern = evidence(), Pattern.parse(text)
    expected = literal(given.weight.abs().tolist(), given.weight, pattern)
    assert torch.equal(magnitude.prune(Evidence(given.weight), pattern, "in"), expected)


@pytest.mark.parametrize("text", ["0.5", "0.3"])
def test_magnitude_without_blocks_drops_the_smallest_of_the_whole_matrix(text: str) -> None:
    weight, pattern = evidence().weight, Pattern.parse(text)
    expected = literal([weight.abs().flatten().tolist()], weight.reshape(1, -1), pattern).reshape(weight.shape)
    assert torch.equal(magnitude.prune(Evidence(weight), pattern, "in"), expected)


@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_equals_its_formula(text: str) -> None:
    given, pattern = evidence(), Pattern.parse(text)
    expected = literal(wanda_scores(given), given.weight, pattern)
    assert torch.equal(wanda.prune(given, pattern, "in"), expected)
    assert not torch.equal(expected, literal(given.weight.abs().tolist(), given.weight, pattern))


@pytest.mark.parametrize("text", PATTERNS)
def test_dass_lets_gate_and_up_compete_for_channels_within_one_input(text: str) -> None:
    """`|W_ij| * ||h_i||^0.5`, blocks of consecutive channels i; what comes in is not looked at."""
    given, pattern = evidence(), Pattern.parse(text)
    norms = [(TOKENS * float(square)) ** 0.5 for square in given.channel_sq_mean]
    scores = [[abs(w) * norm**0.5 for w in row] for row, norm in zip(given.weight.tolist(), norms, strict=True)]
    expected = literal(scores, given.weight, pattern, "out")
    assert torch.equal(dass.prune(given, pattern, "out"), expected)
    blind = replace(given, input_sq_mean=None)
    assert torch.equal(dass.prune(blind, pattern, "out"), expected)
    alike = replace(given, channel_sq_mean=torch.ones(ROWS))
    assert not torch.equal(dass.prune(alike, pattern, "out"), expected)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("is_gate", [False, True])
def test_dass_along_the_inputs_is_wanda(text: str, is_gate: bool) -> None:
    """down_proj, what has no gate, attention; and gate and up in the layout of the hardware."""
    given = evidence() if is_gate else replace(evidence(), channel_sq_mean=None)
    found = dass.prune(given, Pattern.parse(text), "in")
    assert torch.equal(found, wanda.prune(given, Pattern.parse(text), "in"))


def literal_sparsegpt(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, stretch: int = 128) -> torch.Tensor:
    """One optimal brain surgeon's step for each column, by the inverse of what is left of H.

    Masks of M columns at once, or of a stretch and all rows at once, from the weights as they are then.
    """
    weight, system = weight.double().clone(), gram.double().clone()
    damping = DAMPING * float(gram.double().diagonal().mean())
    columns = len(gram)
    for j in range(columns):
        if gram[j, j] == 0:
            weight[:, j], system[j, j] = 0.0, 1.0
    system += damping * torch.eye(columns)
    inverses = [torch.linalg.inv(system[j:, j:]) for j in range(columns)]
    zero = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(columns):
        if j % (pattern.block_m or stretch) == 0:
            block = range(j, min(j + (pattern.block_m or stretch), columns))
            scores = [[float(weight[row, k] ** 2 / inverses[k][0, 0]) for k in block] for row in range(len(weight))]
            places = [(row, k) for row in range(len(weight)) for k in block]
            lines = [[place for place in places if place[0] == row] for row in range(len(weight))]
            for line in lines if pattern.block_m else [places]:
                count = len(line) - pattern.keep_n if pattern.block_m else int(pattern.sparsity * len(line))
                by_score = sorted(line, key=lambda place, scores=scores, j=j: scores[place[0]][place[1] - j])
                for place in by_score[: max(0, count)]:
                    zero[place] = True
        inverse = inverses[j]
        lost = torch.where(zero[:, j], weight[:, j], 0.0)
        weight[:, j:] -= torch.outer(lost / inverse[0, 0], inverse[0])
        weight[:, j] = torch.where(zero[:, j], 0.0, weight[:, j])
    return weight


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_equals_an_elimination_by_the_trailing_inverses(text: str) -> None:
    given, pattern = evidence(), Pattern.parse(text)
    expected = literal_sparsegpt(given.weight, given.gram, pattern)
    found = sparsegpt.prune(given, pattern, "in")
    assert found.dtype == torch.float32
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["2:4", "7:16", "0.5"])
def test_sparsegpt_goes_on_behind_a_stretch_of_columns(text: str) -> None:
    given, pattern = evidence(rows=5, columns=sparsegpt.COLUMNS + 9, seed=2), Pattern.parse(text)
    expected = literal_sparsegpt(given.weight, given.gram, pattern, sparsegpt.COLUMNS)
    found = sparsegpt.prune(given, pattern, "in")
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=2e-4)


def test_stretches_of_columns_are_a_matter_of_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given, pattern = evidence(columns=40), Pattern.parse("2:4")
    whole = sparsegpt.prune(given, pattern, "in")
    monkeypatch.setattr(sparsegpt, "COLUMNS", 8)
    torch.testing.assert_close(sparsegpt.prune(given, pattern, "in"), whole, rtol=1e-4, atol=1e-5)


def lost(given: Evidence, found: torch.Tensor) -> float:
    gone = given.weight - found
    return float(((gone @ given.gram) * gone).sum())


@pytest.mark.parametrize("text", ["2:4", "4:8", "0.5"])
def test_each_method_that_looks_at_more_loses_less_of_the_output(text: str) -> None:
    given, pattern = evidence(rows=64), Pattern.parse(text)
    methods = (magnitude, wanda, sparsegpt, alps)
    by_weight, by_input, column_by_column, at_once = (lost(given, m.prune(given, pattern, "in")) for m in methods)
    assert at_once < column_by_column < 0.9 * by_input < 0.9 * by_weight


@pytest.mark.parametrize("text", ["2:4", "7:16", "0.5"])
def test_dead_inputs_lose_their_weights_and_do_no_harm(text: str) -> None:
    given, pattern = evidence(), Pattern.parse(text)
    dead = [0, 5, 6, 21]
    alive = torch.ones(COLUMNS)
    alive[dead] = 0.0
    given = replace(given, gram=given.gram * alive * alive[:, None], input_sq_mean=given.input_sq_mean * alive)
    found = sparsegpt.prune(given, pattern, "in")
    assert torch.isfinite(found).all()
    assert not found[:, dead].any()
    expected = literal_sparsegpt(given.weight, given.gram, pattern)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
    for method in (wanda, alps):
        found = method.prune(given, pattern, "in")
        assert torch.isfinite(found).all()
        assert pattern.find(found).broken == 0
        assert method is wanda or not found[:, dead].any()


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
def test_dead_inputs_take_no_place_from_others_however_small_those_are(size: float) -> None:
    given, pattern = evidence(rows=64), Pattern.parse("2:4")
    alive = torch.full((COLUMNS,), size)
    alive[::4] = 0.0
    given = replace(given, gram=given.gram * alive * alive[:, None], input_sq_mean=given.input_sq_mean * alive**2)
    found = alps.prune(given, pattern, "in")
    assert not found[:, ::4].any()
    assert lost(given, found) < lost(given, wanda.prune(given, pattern, "in"))


def test_inputs_that_were_never_seen_leave_the_pattern_all_the_same() -> None:
    given = replace(evidence(), gram=torch.zeros(COLUMNS, COLUMNS), input_sq_mean=torch.zeros(COLUMNS))
    for method in (wanda, sparsegpt, alps):
        found = method.prune(given, Pattern.parse("2:4"), "in")
        assert torch.isfinite(found).all()
        assert Pattern.parse("2:4").find(found).broken == 0


def test_one_token_is_enough_for_the_damped_system() -> None:
    x = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(4))
    given, pattern = replace(evidence(), gram=x.T @ x), Pattern.parse("2:4")
    expected = literal_sparsegpt(given.weight, given.gram, pattern)
    torch.testing.assert_close(sparsegpt.prune(given, pattern, "in"), expected.float(), rtol=1e-2, atol=1e-3)


def literal_alps(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The method of multipliers step by step, with a system that is solved anew in each, by inputs of unit size."""
    scale = torch.tensor([float(gram[j, j]) ** 0.5 or 1.0 for j in range(len(gram))]).double()
    system = gram.double() / torch.outer(scale, scale) + alps.DAMPING * torch.eye(len(gram))
    dense = weight.double() * scale
    sparse = literal(dense.abs().tolist(), dense, pattern)
    multipliers, rho = torch.zeros_like(dense), alps.PENALTY
    for _ in range(alps.STEPS):
        right = dense @ system - multipliers + rho * sparse
        fitted = torch.linalg.solve(system + rho * torch.eye(len(gram)), right.T).T
        chosen = fitted + multipliers / rho
        sparse = literal(chosen.abs().tolist(), chosen, pattern)
        multipliers = multipliers + rho * (fitted - sparse)
        rho *= alps.GROWTH
    return sparse / scale


@pytest.mark.parametrize("text", PATTERNS)
def test_alps_equals_its_formula(text: str) -> None:
    given, pattern = evidence(), Pattern.parse(text)
    expected, found = literal_alps(given.weight, given.gram, pattern), alps.prune(given, pattern, "in")
    assert found.dtype == torch.float32
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damage", ["nan", "inf"])
def test_alps_refuses_a_gram_matrix_that_is_not_finite(damage: str) -> None:
    gram = evidence().gram.clone()
    gram[2, 3] = gram[3, 2] = float(damage)
    with pytest.raises(EdgepruneError, match=f"Gram matrix of {COLUMNS} inputs is not finite; expected finite calib"):
        alps.prune(replace(evidence(), gram=gram), Pattern.parse("2:4"), "in")


@pytest.mark.parametrize("damage", ["nan", "inf", "indefinite"])
def test_gram_matrix_that_has_no_inverse_is_refused(damage: str) -> None:
    gram = evidence().gram.clone()
    if damage == "indefinite":
        gram[2, 3] = gram[3, 2] = 2 * gram.diagonal().max()
    else:
        gram[2, 3] = gram[3, 2] = float(damage)
    with pytest.raises(EdgepruneError, match=f"Gram matrix of {COLUMNS} inputs is singular .* expected more calib"):
        sparsegpt.prune(replace(evidence(), gram=gram), Pattern.parse("2:4"), "in")


@pytest.mark.parametrize("method", [magnitude, wanda, dass, sparsegpt, alps])
@pytest.mark.parametrize("text", ["2:4", "3:16", "0.5"])
def test_evidence_is_left_as_it_was(method: object, text: str) -> None:
    given, before = evidence(), evidence()
    for side in ("in", "out") if method is dass else ("in",):
        found = method.prune(given, Pattern.parse(text), side)
        assert found.shape == given.weight.shape
        assert Pattern.parse(text).find(found, side).broken == 0
    for name in ("weight", "input_sq_mean", "gram", "channel_sq_mean"):
        assert torch.equal(getattr(given, name), getattr(before, name))


@pytest.mark.parametrize("method", [magnitude, wanda, dass])
def test_method_that_only_chooses_leaves_what_stays_as_it_was(method: object) -> None:
    given = evidence()
    found = method.prune(given, Pattern.parse("2:4"), "in")
    assert torch.equal(found[found != 0], given.weight[found != 0])
