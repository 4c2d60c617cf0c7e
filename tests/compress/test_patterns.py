"""Patterns against plain loops over single weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.groups import Side
from edgeprune.patterns import BLOCKS, Found, Pattern, check_pattern
from edgeprune.plan import SparsityRecord
from edgeprune_runtime.errors import EdgepruneError, GateError

PATTERNS = [f"{keep}:{block}" for block in BLOCKS for keep in range(1, block)]
SIDES: tuple[Side, ...] = ("in", "out")


def different(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix without two equal entries, so that there is one answer to which of them are the largest."""
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    return (order.float() - order.numel() / 3).reshape(rows, columns)


def literal_keep(scores: torch.Tensor, keep_n: int, block_m: int, side: Side) -> torch.Tensor:
    """Block by block, and in a block one weight after the other, the largest first."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    lines, along = (kept, scores) if side == "in" else (kept.T, scores.T)
    for line, of_line in enumerate(along.tolist()):
        for begin in range(0, len(of_line), block_m):
            block = range(begin, min(begin + block_m, len(of_line)))
            for place in sorted(block, key=lambda place, of_line=of_line: -of_line[place])[:keep_n]:
                lines[line, place] = True
    return kept


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATTERNS)
def test_blocks_are_named_by_what_is_kept(text: str) -> None:
    pattern = Pattern.parse(text)
    keep_n, block_m = map(int, text.split(":"))
    assert (pattern.keep_n, pattern.block_m, str(pattern)) == (keep_n, block_m, text)
    assert pattern.sparsity == 1 - keep_n / block_m


@pytest.mark.parametrize(("text", "share"), [("0.5", 0.5), (".75", 0.75), ("0.123456789", 0.123456789)])
def test_share_of_zeros_has_no_blocks(text: str, share: float) -> None:
    assert Pattern.parse(text) == Pattern(share, 0, 0)
    assert Pattern.parse(str(Pattern(0.5))) == Pattern(0.5)


@pytest.mark.parametrize(
    "text", ["0:4", "4:4", "5:4", "1:2", "2:3", "2:5", "8:32", "16:16", "0:16", "1:0", "99:99", "00:04"]
)
def test_blocks_out_of_range_are_refused(text: str) -> None:
    expected = "is out of range; expected N:M, N weights kept of M in 4, 8, 16, and 0 < N < M"
    with pytest.raises(EdgepruneError) as refused:
        Pattern.parse(text)
    assert str(refused.value) == f"pattern {text!r} {expected}"


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2:", ":4", "2:4:8", "2/4", "-2:4", "2:-4", "2:4 ", " 2:4", "2.0:4", "two:four", "100:400", "2:4\n"),
        *("0", "1", "0.0", "1.0", "1.5", "-0.5", "0.", ".", "50%", "0.5\n", "5e-1", "nan", "inf", "0.1234567890"),
        "٢:٤",  # digits to Python, but not to a reader
    ],
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(EdgepruneError, match="unknown sparsity pattern") as refused:
        Pattern.parse(text)
    assert repr(text) in str(refused.value)
    assert "expected N:M such as 2:4 (N kept of M in 4, 8, 16), or a share of zeros between 0 and 1 such as 0.5" in str(
        refused.value
    )


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", ["1:4", "2:4", "3:4", "4:8", "7:8", "1:16", "7:16", "8:16"])
@pytest.mark.parametrize("shape", [(6, 32), (32, 6), (5, 19), (19, 5), (1, 3), (3, 1)])
def test_largest_of_each_block_stay(text: str, shape: tuple[int, int], side: Side) -> None:
    pattern, scores = Pattern.parse(text), different(*shape)
    expected = literal_keep(scores, pattern.keep_n, pattern.block_m, side)
    found = pattern.keep(scores, side)
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("share", "zeros"), [("0.5", 9), ("0.25", 4), ("0.9", 17), (".01", 0)])
def test_largest_of_each_line_stay_where_there_are_no_blocks(share: str, zeros: int, side: Side) -> None:
    scores = different(7, 19) if side == "in" else different(19, 7)
    kept = Pattern.parse(share).keep(scores, side)
    for of_line, stays in zip(*((m if side == "in" else m.T).tolist() for m in (scores, kept)), strict=True):
        smallest = sorted(range(19), key=lambda place, of_line=of_line: of_line[place])[:zeros]
        assert stays == [place not in smallest for place in range(19)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*PATTERNS, "0.5", "0.37", "0.99"]),
    st.sampled_from(SIDES),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_pattern_holds_in_what_it_keeps(text: str, side: Side, rows: int, columns: int, seed: int) -> None:
    pattern, weight = Pattern.parse(text), different(rows, columns, seed) + 0.5
    kept = weight * pattern.keep(weight.abs(), side)
    found = pattern.find(kept, side)
    assert found.broken == 0
    assert found.weights == rows * columns
    assert found.nonzeros == int((kept != 0).sum()) <= found.allowed


def test_scores_that_are_all_alike_leave_as_many() -> None:
    for text in ("2:4", "5:16", "0.5"):
        for side in SIDES:
            assert int(Pattern.parse(text).keep(torch.zeros(16, 16), side).sum()) == {"5:16": 80}.get(text, 128)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("text", "last_allows"), [("1:4", 1), ("2:4", 2), ("3:4", 3), ("4:8", 3), ("2:16", 2)])
def test_weights_and_blocks_are_counted_also_where_the_last_block_is_short(
    text: str, last_allows: int, side: Side
) -> None:
    """19 inputs: whole blocks, and one of 3."""
    pattern = Pattern.parse(text)
    dense = torch.ones(5, 19) if side == "in" else torch.ones(19, 5)
    whole = 19 // pattern.block_m
    broken = whole + (pattern.keep_n < 3)
    expected = Found(95, 95, 5 * (whole * pattern.keep_n + last_allows), 5 * broken)
    assert pattern.find(dense, side) == expected
    assert pattern.find(torch.zeros_like(dense), side) == Found(95, 0, expected.allowed, 0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", ["2:4", "4:8", "3:16"])
def test_one_weight_too_many_is_found(text: str, side: Side) -> None:
    pattern, weight = Pattern.parse(text), different(16, 16) + 0.5
    kept = weight * pattern.keep(weight, side)
    kept[tuple((kept == 0).nonzero()[7].tolist())] = -1e-30
    found = pattern.find(kept, side)
    assert found.broken == 1
    assert found.nonzeros == found.allowed + 1


def test_blocks_along_one_side_are_none_along_the_other() -> None:
    weight, pattern = different(16, 16) + 0.5, Pattern.parse("2:4")
    for side, other in (SIDES, SIDES[::-1]):
        kept = weight * pattern.keep(weight, side)
        assert pattern.find(kept, side).broken == 0
        assert pattern.find(kept, other).broken > 0


@pytest.mark.parametrize("side", SIDES)
def test_share_of_zeros_may_miss_a_rest_of_each_line_and_no_more(side: Side) -> None:
    """Half of 7 is no whole number: a line keeps 4, so that 4 * 20 of 140 weights are not zero where 70 were to be."""
    pattern = Pattern.parse("0.5")
    weight = different(20, 7) + 0.5 if side == "in" else different(7, 20) + 0.5
    kept = weight * pattern.keep(weight, side)
    assert pattern.find(kept, side) == Found(140, 80, 90, 0)
    lines = kept if side == "in" else kept.T
    for row in range(10):
        lines[row] = 1.0
    assert pattern.find(kept, side).broken == 1


def test_shares_are_of_all_that_was_counted() -> None:
    both = Found(100, 40, 50, 0) + Found(300, 60, 90, 2)
    assert both == Found(400, 100, 140, 2)
    assert both.sparsity == pytest.approx(0.75)
    assert both.expected_sparsity == pytest.approx(0.65)


# --- a model's Linears ------------------------------------------------------------------------------------------------

RECORD = SparsityRecord("2:4", "wanda", "mlp", "paper", "none", {"a": "in", "b": "out"})


def kept(side: Side, seed: int) -> torch.Tensor:
    weight = different(8, 12, seed) + 0.5
    return weight * Pattern.parse("2:4").keep(weight, side)


def test_all_linears_of_a_record_are_counted_along_their_sides() -> None:
    weights = {"a": kept("in", 0), "b": kept("out", 1)}
    assert check_pattern(RECORD, weights.__getitem__, "here") == Found(192, 96, 96, 0)


@pytest.mark.parametrize("name", ["a", "b"])
def test_linear_that_breaks_the_pattern_is_named_with_its_counts(name: str) -> None:
    weights = {"a": kept("in", 0), "b": kept("out", 1)}
    weights[name][3, :] = 1.0
    weights[name][:, 2] = 1.0
    found = Pattern.parse("2:4").find(weights[name], RECORD.sides[name])
    with pytest.raises(GateError) as broken:
        check_pattern(RECORD, weights.__getitem__, "some file")
    assert str(broken.value) == (
        f"some file: {name} breaks the pattern 2:4 in {found.broken} places, {found.nonzeros} weights are not zero "
        "where 48 may be; it must not be used"
    )
