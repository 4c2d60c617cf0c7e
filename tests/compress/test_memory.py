"""What a run needs is known from shapes, and what a limit does not hold is refused with words that help."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from toys import toy

from edgeprune.calibration import Calibration
from edgeprune.journal import Entry, Journal
from edgeprune.memory import Footprint, Sizes, Work, fit, phases, scratch_bytes
from edgeprune.pruning import Settings, apply_plan, make_plan
from edgeprune.sparsify import Scope, Sparsity, sparsify
from edgeprune.statistics import BATCH_TOKENS, Method
from edgeprune.streaming import Decoder
from edgeprune_runtime.errors import EdgepruneError

GB = 10**9
SEVEN = Sizes(  # Llama-7B in bfloat16, 64 x 512 tokens
    outside_bytes=2 * 2 * 32000 * 4096,
    outside_parameters=2 * 32000 * 4096,
    behind_parameters=32000 * 4096,
    block_bytes=2 * 202_383_360,
    block_parameters=202_383_360,
    mlp_parameters=135_266_304,
    blocks_bytes=32 * 2 * 202_383_360,
    layers=32,
    hidden_size=4096,
    vocabulary=32000,
    inner=(4096, 11008),
    linear_parameters=4096 * 11008,
    linear_lines=4 * 2 * 4096 + 3 * (4096 + 11008),
    sequences=64,
    length_tokens=512,
)


def work(
    method: str = "wanda-sp", dtype: torch.dtype = torch.bfloat16, refits: bool = True, reconstructs: bool = False
) -> Work:
    parsed = Method.parse(method)
    graded = 32 if parsed.reads_gradients else 0
    return Work(parsed, refits, dtype, graded, reconstructs=reconstructs)


def fitted(limit: float, *arguments: Any, **options: Any) -> Footprint:
    return fit(SEVEN, work(*arguments, **options), int(limit))


def test_seven_billion_parameters_are_pruned_in_six_gigabytes() -> None:
    footprint = fitted(6 * GB)
    assert footprint.peak_bytes < 6 * GB
    assert not footprint.keeps_blocks
    assert footprint.step_tokens == BATCH_TOKENS
    assert 15 * GB < footprint.scratch_bytes < 25 * GB


def test_seven_billion_parameters_are_reconstructed_in_six_gigabytes() -> None:
    footprint = fitted(6 * GB, reconstructs=True)
    assert footprint.peak_bytes < 6 * GB
    assert footprint.scratch_bytes > fitted(6 * GB).scratch_bytes
    wide = replace(SEVEN, mlp_parameters=3 * SEVEN.mlp_parameters)
    with pytest.raises(
        EdgepruneError, match=r"the reconstruction of the last block takes .* use --refit least-squares"
    ):
        fit(wide, work(reconstructs=True), 6 * GB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_does_with_six_gigabytes_for_seven_billion_parameters(dtype: torch.dtype) -> None:
    default = replace(work(dtype=dtype, reconstructs=True), judges=True)
    assert fit(SEVEN, default, 6 * GB).peak_bytes < 6 * GB
    tied = replace(SEVEN, behind_parameters=SEVEN.outside_parameters)  # where the head is the embedding as well
    last = "the reconstruction of the last block"
    more = 4 * 32000 * 4096 if dtype == torch.float32 else 0
    assert phases(tied, default, 4096)[last] == phases(SEVEN, default, 4096)[last] + more


def test_need_does_not_grow_with_the_number_of_blocks() -> None:
    deep = Sizes(**(vars(SEVEN) | {"layers": 320, "blocks_bytes": 10 * SEVEN.blocks_bytes}))
    for method in ("wanda-sp", "obs", "fusion", "taylor-mixed"):
        assert phases(deep, work(method), 4096) == phases(SEVEN, work(method), 4096)
    assert scratch_bytes(deep, work()) > 9 * scratch_bytes(SEVEN, work())


def test_a_search_holds_whole_models_and_is_refused_where_they_do_not_fit() -> None:
    searching = replace(work(), judges=True, searches=True)
    deep = replace(SEVEN, layers=64)
    assert (
        phases(deep, searching, 4096)["the search over widths"]
        > phases(SEVEN, searching, 4096)["the search over widths"]
    )
    with pytest.raises(EdgepruneError, match=r"the search over widths takes about .* use --allocation judged"):
        fit(SEVEN, searching, 6 * GB)


def test_a_recovery_holds_the_whole_model_and_is_refused_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.memory.machine_bytes", lambda: 16 * GB)
    recovering = replace(work(reconstructs=True), recovers=True)
    need = phases(SEVEN, recovering, 4096)["the recovery of the whole model"]
    assert need > 4 * SEVEN.layers * SEVEN.block_parameters
    assert phases(replace(SEVEN, layers=64), recovering, 4096)["the recovery of the whole model"] > 1.5 * need
    for limit in (6 * GB, None):
        with pytest.raises(EdgepruneError, match=r"the recovery of the whole model takes .* use --recover none"):
            fit(SEVEN, recovering, limit)
    assert fit(SEVEN, recovering, 2 * need).scratch_bytes > fit(SEVEN, work(reconstructs=True), 2 * need).scratch_bytes


def test_a_search_that_no_machine_of_this_size_holds_is_refused_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgeprune.memory.machine_bytes", lambda: 16 * GB)
    with pytest.raises(EdgepruneError, match=r"this machine's .* the search over widths .* use --allocation judged"):
        fit(SEVEN, replace(work(), judges=True, searches=True), None)
    assert not fit(SEVEN, work(), None).keeps_blocks


def test_widths_of_seven_billion_parameters_are_judged_in_six_gigabytes() -> None:
    judging = replace(work("fisher", reconstructs=True), judges=True)
    assert fit(SEVEN, judging, 6 * GB).peak_bytes < 6 * GB
    of_phases = phases(SEVEN, judging, 4096)
    assert of_phases == phases(replace(SEVEN, layers=320), judging, 4096)
    assert of_phases["the judging of a block"] > of_phases["the judging of a cut"] > 0
    comparing = phases(SEVEN, replace(judging, compares=True), 4096)
    assert comparing == of_phases | {"the scores of a block": phases(SEVEN, work("obs"), 4096)["the scores of a block"]}


def test_steps_become_smaller_to_fit() -> None:
    wide = fitted(100 * GB, "taylor-fine", refits=False)
    narrow = fitted(
        0.9 * max(phases(SEVEN, work("taylor-fine", refits=False), BATCH_TOKENS).values()), "taylor-fine", refits=False
    )
    assert narrow.step_tokens < wide.step_tokens == BATCH_TOKENS
    assert narrow.step_tokens % SEVEN.length_tokens == 0


def sparse(zeros: Scope, *, sums_products: bool = True) -> Work:
    return replace(work("magnitude", refits=False), zeros=zeros, sums_products=sums_products)


def test_zeros_take_what_one_block_takes_whatever_the_number_of_blocks() -> None:
    deep = replace(SEVEN, layers=320, blocks_bytes=10 * SEVEN.blocks_bytes)
    for zeros in get_args(Scope):
        assert phases(deep, sparse(zeros), 4096) == phases(SEVEN, sparse(zeros), 4096)


def test_zeros_take_more_where_products_of_inputs_are_summed_and_more_linears_read_them() -> None:
    needs = {
        (zeros, products): phases(SEVEN, sparse(zeros, sums_products=products), 4096)["the zeros of a block"]
        for zeros in get_args(Scope)
        for products in (False, True)
    }
    products_of_inputs = 2 * 4 * 11008**2  # of the fitting tokens, and of those kept aside
    assert needs["mlp", True] > needs["mlp", False] + products_of_inputs
    assert needs["all", True] > needs["mlp", True]
    assert "the zeros of a block" not in phases(SEVEN, work(), 4096)


def test_seven_billion_parameters_get_zeros_by_wanda_in_six_gigabytes() -> None:
    footprint = fit(SEVEN, sparse("all", sums_products=False), 6 * GB)
    assert footprint.peak_bytes < 6 * GB
    assert not footprint.keeps_blocks


def test_zeros_that_do_not_fit_are_refused_with_what_would() -> None:
    need = phases(SEVEN, sparse("mlp"), 512)["the zeros of a block"]
    fit(SEVEN, sparse("mlp"), int(1.3 * need))
    with pytest.raises(EdgepruneError, match=r"the zeros of a block takes about .* GiB; give that much, or") as refused:
        fit(SEVEN, sparse("mlp"), int(0.9 * need))
    # Wanda without a refit sums no products, and fits
    assert fit(SEVEN, sparse("mlp", sums_products=False), int(0.9 * need)).peak_bytes < 0.9 * need
    assert "take a smaller model" not in str(refused.value)


class Weighed(Journal):
    """A journal that knows the most that it has taken on disk."""

    most = 0

    def put(self, name: str, entry: Entry) -> None:
        super().put(name, entry)
        self.most = max(self.most, self.size_bytes)


@pytest.mark.parametrize("ratio", [0.0, 0.2])
@pytest.mark.parametrize("refit", ["least-squares", "reconstruct"])
def test_journal_takes_no_more_disk_than_was_said(ratio: float, refit: str, tmp_path: Path) -> None:
    """A cut leaves every block in it, and so do the zeros after it."""
    model, journal = toy("llama", num_hidden_layers=6), Weighed(tmp_path)
    tokens = Calibration(torch.randint(3, 97, (8, 8), generator=torch.Generator().manual_seed(1)), "test", 0, "")
    settings = Settings(ratio, refit=refit, allocation="protect:1,0", align=4, min_channels=8)
    said = Work(
        Method.parse(settings.method),
        refits=bool(ratio),
        dtype=torch.float32,
        graded=0,
        reconstructs=refit == "reconstruct",
        zeros="mlp",
        sums_products=True,
    )
    most = scratch_bytes(Sizes.of(Decoder.of(model), 8, 8), said)
    if ratio:
        plan, stats = make_plan(model, "toy", tokens, settings, journal=journal)
        apply_plan(model, plan, stats.moments, tokens, journal=journal)
    sparsify(model, Sparsity("2:4", "wanda", "mlp", "hardware", refit), tokens, journal=journal)
    assert 0.3 * most < journal.most < 1.05 * most  # headers, which are a good deal of what a toy takes


def test_blocks_stay_where_all_of_them_fit() -> None:
    assert fitted(30 * GB).keeps_blocks
    assert not fitted(15 * GB).keeps_blocks


@pytest.mark.parametrize(
    ("limit", "arguments", "advice"),
    [
        (3 * GB, ("wanda-sp",), "use --refit none"),
        (2.5 * GB, ("wanda-sp",), "use --refit none --method magnitude"),
        (1 * GB, ("magnitude", torch.float32), "take a smaller model"),
        (4 * GB, ("taylor-mixed", torch.bfloat16, False), "use a --method without gradients"),
    ],
)
def test_refusal_says_what_helps(limit: float, arguments: tuple[Any, ...], advice: str) -> None:
    with pytest.raises(EdgepruneError, match=r"does not do: .* takes about .* GiB; give that much, or") as refused:
        fitted(limit, *arguments)
    assert advice in str(refused.value)


def test_without_a_limit_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.memory.default_budget", lambda: 1)
    footprint = fit(SEVEN, work(), None)
    assert not footprint.keeps_blocks
    assert footprint.step_tokens == BATCH_TOKENS


def test_sizes_of_a_model_are_those_of_its_tensors() -> None:
    model = toy("llama-bias").to(torch.bfloat16)
    sizes = Sizes.of(Decoder.of(model), 5, 20)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sizes.outside_parameters + 3 * sizes.block_parameters == parameters
    assert sizes.outside_bytes + sizes.blocks_bytes == 2 * parameters
    assert sizes.inner == (32, 80)
    assert sizes.linear_parameters == 80 * (48 + 1)
    assert sizes.hidden_bytes == 4 * 5 * 20 * 48
