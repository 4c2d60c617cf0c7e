"""The walk that puts zeros into a model: order, inputs, blocks that come and go, and runs that are cut off."""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import groups_of
from observed import block_outputs
from torch import nn
from toys import KINDS, NAMES, per_layer_lists, toy
from trained import stories
from transformers.pytorch_utils import Conv1D

from edgeprune import survivors
from edgeprune.calibration import Calibration
from edgeprune.checkpoint import load_pruned, open_decoder, save
from edgeprune.groups import blocks_name, layer_widths
from edgeprune.journal import Entry, Journal
from edgeprune.patterns import Pattern, check_pattern
from edgeprune.plan import PrunePlan
from edgeprune.pruning import Settings, apply_plan, keep_all, make_plan, progress_so_far
from edgeprune.refit import Outcome
from edgeprune.shrink import linear_of, weight_of
from edgeprune.sparsify import Sparsity, sparsify
from edgeprune.sparsity import Evidence, dass, sparsegpt, wanda
from edgeprune.statistics import Moments
from edgeprune.streaming import Decoder
from edgeprune.survivors import refit_survivors
from edgeprune_runtime.errors import EdgepruneError, GateError

METHODS = ["magnitude", "wanda", "dass", "sparsegpt", "alps"]
LAYOUTS = [(method, "hardware") for method in METHODS] + [("dass", "paper")]
GATED = [name for name in NAMES if not name.startswith(("gpt", "opt", "bloom"))]
ASIDE = 8
"""One of so many sequences is kept aside."""


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refits that go on to the end; where they stop early, the last digits of their inputs decide when."""
    monkeypatch.setattr(survivors, "STEPS", 300)
    monkeypatch.setattr(survivors, "TOLERANCE", 1e-6)


def calibration(sequences: int = 16, length: int = 16) -> Calibration:
    ids = torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Calibration(ids, "test", 0, "")


def small(name: str, layers: int = 2, **changes: Any) -> Any:
    """A toy of two blocks: one that reads the embedding, and one that reads what zeros gave."""
    return toy(name, num_hidden_layers=layers, **per_layer_lists(name, layers) | changes)


def how(text: str, **changes: Any) -> Sparsity:
    """METHOD/SCOPE/LAYOUT/REFIT, in 2:4 unless another pattern is given."""
    method, scope, layout, refit = text.split("/")
    options: dict[str, Any] = {"method": method, "scope": scope, "layout": layout, "refit": refit}
    return Sparsity(**{"pattern": "2:4"} | options | changes)


def holds(model: Any, sparsity: Sparsity) -> None:
    """Every Linear of the record has the pattern, without a weight less than it allows."""
    found = check_pattern(sparsity.record(groups_of(model)), lambda name: weight_of(linear_of(model, name)), "here")
    assert found.broken == 0
    assert found.nonzeros <= found.allowed < found.weights
    if Pattern.parse(sparsity.pattern).block_m:
        assert found.nonzeros == found.allowed


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- which weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["mlp", "all"])
@pytest.mark.parametrize(("method", "layout"), LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_pattern_holds_in_every_named_linear_and_nothing_else_is_touched(
    name: str, method: str, layout: str, scope: str
) -> None:
    sparsity = how(f"{method}/{scope}/{layout}/none")
    model = small(name, layers=1)
    before = tensors(model)
    assert sparsify(model, sparsity, calibration(8)) == {}
    holds(model, sparsity)
    named = {f"{linear}.weight" for linear in sparsity.record(groups_of(model)).sides}
    for key, tensor in tensors(model).items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]) != (key in named)


@pytest.mark.parametrize("name", KINDS)
def test_refit_changes_survivors_alone(name: str) -> None:
    plain, refitted, sparsity = small(name), small(name), how("wanda/all/hardware/least-squares")
    sparsify(plain, how("wanda/all/hardware/none"), calibration())
    outcomes = sparsify(refitted, sparsity, calibration())
    assert outcomes.keys() == sparsity.record(groups_of(refitted)).sides.keys()
    assert any(outcome.is_accepted for outcome in outcomes.values())
    holds(refitted, sparsity)
    first = next(iter(outcomes))  # what later blocks read is no longer the same
    masks = [weight_of(linear_of(model, first)) == 0 for model in (plain, refitted)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("text", ["1:4", "4:8", "7:16", "0.5"])
@pytest.mark.parametrize("case", ["wanda/all/hardware/none", "dass/mlp/paper/none", "sparsegpt/mlp/hardware/none"])
def test_other_patterns_hold_as_well(text: str, case: str) -> None:
    for name in ("phi3", "gpt2"):
        sparsity, model = how(case, pattern=text), small(name, intermediate_size=88, n_inner=88)
        sparsify(model, sparsity, calibration())
        holds(model, sparsity)


@pytest.mark.parametrize("name", NAMES)
def test_scope_all_names_every_linear_of_the_blocks_and_scope_mlp_none_of_attention(name: str) -> None:
    model = toy(name)
    prefix = f"{blocks_name(groups_of(model))}."
    inside = {
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module_name.startswith(prefix)
    }
    everything, mlp = (how(f"wanda/{scope}/hardware/none").record(groups_of(model)).sides for scope in ("all", "mlp"))
    assert set(everything) == inside
    assert set(mlp) == {linear for linear in inside if "attn" not in linear and "attention" not in linear}
    assert set(everything.values()) | set(mlp.values()) == {"in"}


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_paper_turns_the_blocks_of_gate_and_up_alone(name: str) -> None:
    groups = groups_of(toy(name))
    sides = how("dass/all/paper/none").record(groups).sides
    turned = {linear.rpartition(".")[2] for linear, side in sides.items() if side == "out"}
    fused = name.startswith("phi3")
    assert turned == (({"gate_up_proj"} if fused else {"gate_proj", "up_proj"}) if name in GATED else set())
    assert set(how("dass/all/hardware/none").record(groups).sides.values()) == {"in"}


# --- the order, and what is looked at ---------------------------------------------------------------------------------


def read_by(model: Any, layer: int, names: list[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Linears of a block read `(N, T, K)` as the whole model runs."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[name] = inputs[0].reshape(*ids.shape, -1).clone()

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


Make = Callable[[str, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
"""What becomes of the weight `(out, in)` of a Linear, from all that the Linears of its block have read."""


def walk_literally(model: Any, sparsity: Sparsity, ids: torch.Tensor, make: Make) -> None:
    """Whole forward passes of the model, one for each block; the blocks before it have their zeros."""
    sides = sparsity.record(groups_of(model)).sides
    for layer in range(model.config.num_hidden_layers):
        names = [name for name in sides if f".{layer}." in name]
        seen = read_by(model, layer, names, ids)
        new = {name: make(name, weight_of(linear_of(model, name)).detach().clone(), seen) for name in names}
        for name, weight in new.items():
            weight_of(linear_of(model, name)).data.copy_(weight)


def sq_mean(x: torch.Tensor) -> torch.Tensor:
    return x.double().flatten(0, 1).square().mean(0).float()


def moments_of(x: torch.Tensor) -> Moments:
    """Of all tokens; the last sequences are kept aside."""
    aside = x[len(x) - len(x) // ASIDE :].flatten(0, 1)
    everything = x.flatten(0, 1)
    return Moments(
        everything.T @ everything / len(everything),
        everything.mean(0),
        aside.T @ aside / len(aside),
        len(aside) / len(everything),
        aside.mean(0),
    )


@pytest.mark.parametrize("scope", ["mlp", "all"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"])
def test_wanda_sees_what_the_blocks_before_give_with_their_zeros(name: str, scope: str) -> None:
    sparsity, tokens = how(f"wanda/{scope}/hardware/none"), calibration()
    expected, model = toy(name), toy(name)

    def make(linear: str, weight: torch.Tensor, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        return wanda.prune(Evidence(weight, sq_mean(seen[linear])), Pattern.parse("2:4"), "in")

    walk_literally(expected, sparsity, tokens.ids, make)
    sparsify(model, sparsity, tokens)
    assert same(tensors(model), tensors(expected))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_dass_scores_gate_and_up_by_what_down_reads_in_the_same_forward(name: str, pattern: str) -> None:
    sparsity, tokens = how("dass/mlp/paper/none", pattern=pattern), calibration()
    expected, model = toy(name), toy(name)

    def make(linear: str, weight: torch.Tensor, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        channels = sq_mean(next(x for reader, x in seen.items() if reader.endswith("down_proj")))
        if linear.endswith("down_proj"):
            return wanda.prune(Evidence(weight, channels), Pattern.parse(pattern), "in")
        of_rows = torch.cat([channels] * (len(weight) // len(channels)))  # phi3: all gates, then all ups
        return dass.prune(Evidence(weight, channel_sq_mean=of_rows), Pattern.parse(pattern), "out")

    walk_literally(expected, sparsity, tokens.ids, make)
    sparsify(model, sparsity, tokens)
    assert same(tensors(model), tensors(expected))


@pytest.mark.parametrize(
    ("name", "refit"), [("llama", "none"), ("llama", "least-squares"), ("gpt2", "least-squares"), ("bloom", "none")]
)
@pytest.mark.usefixtures("converged")
def test_sparsegpt_and_the_refit_see_all_products_of_the_inputs(name: str, refit: str) -> None:
    """But for the tokens that judge a refit: of these SparseGPT, which changes weights, sees nothing."""
    sparsity, tokens = how(f"sparsegpt/all/hardware/{refit}"), calibration(32)
    expected, model = small(name), small(name)
    outcomes: dict[str, Outcome] = {}

    def make(linear: str, weight: torch.Tensor, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        moments, without = moments_of(seen[linear]), seen[linear][: -len(tokens.ids) // ASIDE]
        gram = moments.gram if refit == "none" else moments_of(without).gram
        sparse = sparsegpt.prune(Evidence(weight, gram=gram), Pattern.parse("2:4"), "in")
        if refit == "none":
            return sparse
        fitted, outcomes[linear] = refit_survivors(weight, sparse, moments)
        return fitted

    walk_literally(expected, sparsity, tokens.ids, make)
    found = sparsify(model, sparsity, tokens)
    for key, tensor in tensors(expected).items():
        assert torch.equal(model.state_dict()[key] == 0, tensor == 0), key
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)
    assert found.keys() == outcomes.keys()
    for linear, outcome in outcomes.items():
        assert found[linear].damping == outcome.damping
        assert found[linear].held_out_error == pytest.approx(outcome.held_out_error, rel=1e-3)
        assert found[linear].held_out_error_before == pytest.approx(outcome.held_out_error_before, rel=1e-3)


@pytest.mark.parametrize("case", ["wanda/all/hardware/none", "sparsegpt/mlp/hardware/least-squares"])
@pytest.mark.usefixtures("converged")
def test_tokens_of_a_step_are_a_matter_of_memory_alone(case: str) -> None:
    models = []
    for step_tokens in (1, 48, 10_000):
        model = small("llama")
        sparsify(model, how(case), calibration(19), step_tokens=step_tokens)
        models.append(tensors(model))
    for other in models[1:]:
        for key, tensor in models[0].items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_refit_any_number_of_sequences_will_do(method: str) -> None:
    model, sparsity = small("llama"), how(f"{method}/all/hardware/none")
    sparsify(model, sparsity, calibration(1, 5))
    holds(model, sparsity)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["dass/mlp/paper/none", "sparsegpt/all/hardware/reconstruct"])
def test_stored_half_precision_stays_and_so_do_the_zeros(case: str, products: torch.dtype) -> None:
    model, sparsity = small("llama").bfloat16(), how(case)
    sparsify(model, sparsity, calibration(), dtype=products)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    holds(model, sparsity)


def test_every_block_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    sparsify(toy("llama"), how("magnitude/mlp/hardware/none"), calibration(), progress=lambda *at: told.append(at))
    assert told == [("sparsity", layer, 3) for layer in range(4)]


# --- reconstruction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scope"), [*((name, "mlp") for name in KINDS), ("llama", "all"), ("gpt2", "all")])
def test_reconstruction_keeps_the_zeros_and_comes_nearer_to_the_dense_blocks(name: str, scope: str) -> None:
    tokens, dense = calibration(48), small(name)
    expected = block_outputs(dense, tokens.ids)
    missed: dict[str, list[float]] = {}
    for refit in ("least-squares", "reconstruct"):
        model, sparsity = small(name), how(f"sparsegpt/{scope}/hardware/{refit}")
        sparsify(model, sparsity, tokens)
        holds(model, sparsity)
        found = block_outputs(model, tokens.ids)
        missed[refit] = [float((a - b).square().mean()) for a, b in zip(found, expected, strict=True)]
    assert missed["reconstruct"][0] < missed["least-squares"][0]
    assert missed["reconstruct"][1] < missed["least-squares"][1]


@pytest.mark.parametrize("name", KINDS)
def test_linears_and_mlps_are_told_apart_in_what_the_refit_says(name: str) -> None:
    model, sparsity = small(name), how("wanda/mlp/hardware/reconstruct")
    linears = sparsity.record(groups_of(model)).sides.keys()
    outcomes = sparsify(model, sparsity, calibration(24))
    assert len(outcomes) == len(linears) + 2
    assert all(outcomes[linear].damping is not None for linear in linears)  # an MLP is fitted without a ridge
    assert all(outcome.damping is None for name, outcome in outcomes.items() if name not in linears)


def test_mlp_that_is_not_simply_added_is_refused_by_its_architecture_alone() -> None:
    model = toy("opt-narrow")
    with pytest.raises(EdgepruneError, match=r"wants an MLP whose output is added .* opt .* --refit least-squares"):
        how("wanda/mlp/hardware/reconstruct").check_for(model.config, groups_of(model))
    how("wanda/mlp/hardware/least-squares").check_for(model.config, groups_of(model))
    for name in NAMES:
        if name != "opt-narrow":
            model = toy(name)
            how("wanda/mlp/hardware/reconstruct").check_for(model.config, groups_of(model))


def test_what_cannot_be_done_is_refused_before_any_weight_is_touched() -> None:
    for name, case, sequences, message in (
        ("opt-narrow", "wanda/mlp/hardware/reconstruct", 16, "wants an MLP"),
        ("llama", "wanda/mlp/hardware/reconstruct", 7, "7 leave none"),
        ("llama", "wanda/mlp/paper/none", 16, "paper"),
    ):
        model = toy(name)
        before = tensors(model)
        with pytest.raises(EdgepruneError, match=message):
            sparsify(model, how(case), calibration(sequences))
        assert same(tensors(model), before)


@pytest.mark.slow
def test_on_a_trained_model_each_step_of_the_refit_wins(stories260k: Path, data_folder: Path) -> None:
    model, fitting, judging = stories(stories260k, data_folder)
    text, losses = Calibration(fitting[:64], "stories", 0, ""), {}
    for case in ("magnitude/none", "wanda/none", "wanda/least-squares", "wanda/reconstruct", "sparsegpt/reconstruct"):
        method, refit = case.split("/")
        smaller, sparsity = copy.deepcopy(model), how(f"{method}/mlp/hardware/{refit}")
        sparsify(smaller, sparsity, text)
        holds(smaller, sparsity)
        with torch.no_grad():
            losses[case] = float(smaller(judging, labels=judging).loss)
    assert losses["wanda/reconstruct"] < losses["wanda/least-squares"] < losses["wanda/none"] < losses["magnitude/none"]
    assert losses["sparsegpt/reconstruct"] < losses["wanda/least-squares"]


# --- blocks that come and go, and runs that are cut off ---------------------------------------------------------------


LAYERS = 3
CASES = ["dass/mlp/paper/none", "wanda/all/hardware/least-squares", "sparsegpt/mlp/hardware/reconstruct"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint. Read only."""
    model = toy("llama")
    out = tmp_path_factory.mktemp("models") / "dense"
    save(model, None, None, layer_widths(groups_of(model), {}), out)
    return out


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty folder for a journal."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def stored(decoder: Decoder) -> dict[str, torch.Tensor]:
    """All tensors, those of blocks from where they are read."""
    with decoder.whole() as model:
        return tensors(model)


@pytest.mark.parametrize("case", ["magnitude/mlp/hardware/none", *CASES])
def test_streamed_decoder_gets_the_same_zeros_as_a_whole_model(folder: Path, work: Path, case: str) -> None:
    expected, said = undisturbed(folder, case)
    for journal, keeps_blocks in ((Journal(work), False), (Journal(), True)):
        decoder = open_decoder(folder, keeps_blocks=keeps_blocks)
        assert sparsify(decoder, how(case), calibration(), journal=journal) == said
        on_meta = [next(block.parameters()).is_meta for block in decoder.blocks]
        assert on_meta == [not keeps_blocks] * LAYERS
        assert same(stored(decoder), expected)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_do_not_pile_up(folder: Path, work: Path, case: str) -> None:
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, len(list(work.glob("*.rows"))))

    sparsify(open_decoder(folder), how(case), calibration(), journal=Journal(work), progress=count)
    assert 0 < most <= 2
    assert {path.name for path in work.iterdir()} == {f"sparse-{layer}.safetensors" for layer in range(LAYERS)}


class CutOffError(Exception):
    """Stands for a kill."""


class Dying(Journal):
    """A journal on disk whose process dies before it, or after it, has put an entry."""

    def __init__(self, folder: Path, name: str, *, is_put: bool) -> None:
        super().__init__(folder)
        self._name, self._is_put = name, is_put

    def put(self, name: str, entry: Entry) -> None:
        if name != self._name:
            return super().put(name, entry)
        if self._is_put:
            super().put(name, entry)
        raise CutOffError


@cache
def undisturbed(folder: Path, case: str) -> tuple[dict[str, torch.Tensor], dict[str, Outcome]]:
    """The tensors of a run that was left alone, and what it said."""
    model = load_pruned(folder)
    outcomes = sparsify(model, how(case), calibration())
    return tensors(model), outcomes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("step", "is_put"), [(0, False), (1, True), (2, True)])
def test_run_that_was_cut_off_continues_to_the_same_bytes(
    folder: Path, work: Path, case: str, step: int, is_put: bool
) -> None:
    with pytest.raises(CutOffError):
        sparsify(open_decoder(folder), how(case), calibration(), journal=Dying(work, f"sparse-{step}", is_put=is_put))
    following, words = step + is_put, progress_so_far(Journal(work), LAYERS)
    where = f"from block {following + 1} of 3" if following < LAYERS else "after the last block"
    assert words == (f"continues {where} (zeros in the weights)" if following else None)
    continued = open_decoder(folder)
    outcomes = sparsify(continued, how(case), calibration(), journal=Journal(work))
    expected, said = undisturbed(folder, case)
    assert same(stored(continued), expected)
    assert outcomes == said
    assert {path.name for path in work.iterdir()} == {f"sparse-{layer}.safetensors" for layer in range(LAYERS)}


def test_finished_blocks_are_not_done_again(folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tokens = how("wanda/mlp/hardware/least-squares"), calibration()
    with pytest.raises(CutOffError):
        sparsify(open_decoder(folder), case, tokens, journal=Dying(work, "sparse-2", is_put=True))
    monkeypatch.setattr(wanda, "prune", lambda *_: pytest.fail("done twice"))
    monkeypatch.setattr("edgeprune.streaming.Pass.run", lambda *_: pytest.fail("run twice"))
    decoder = open_decoder(folder)
    sparsify(decoder, case, tokens, journal=Journal(work))
    with decoder.whole() as model:
        holds(model, case)


def cut_then_zeros(
    model: Any, refit: str, sparsity: Sparsity, journal: Journal, journal_of_zeros: Journal | None = None
) -> dict[str, torch.Tensor]:
    """The tensors after a structured cut and the zeros that follow it, as one command does both."""
    settings = Settings(0.2, refit=refit, allocation="protect:1,0", align=4, min_channels=8)
    decoder, tokens = Decoder.of(model), calibration()
    plan, stats = make_plan(decoder, "toy", tokens, settings, journal=journal)
    apply_plan(decoder, plan, stats.moments, tokens, journal=journal)
    sparsify(decoder, sparsity, tokens, journal=journal_of_zeros or journal)
    assert layer_widths(decoder.groups, {}) == layer_widths(groups_of(toy("llama")), plan.keep)
    with decoder.whole() as whole:
        holds(whole, sparsity)
    return stored(decoder)


@cache
def cut_apart(folder: Path, cut: str, case: str) -> dict[str, torch.Tensor]:
    """The same with two journals, so that neither can read what the other has left."""
    return cut_then_zeros(load_pruned(folder), cut, how(case), Journal(), Journal())


@pytest.mark.parametrize(
    ("cut", "case", "step", "is_put"),
    [
        ("none", CASES[0], "sparse-0", False),
        ("least-squares", CASES[1], "sparse-1", True),
        ("reconstruct", CASES[2], "cut-1", True),
        ("reconstruct", CASES[2], "sparse-0", False),
        ("reconstruct", CASES[2], "sparse-1", True),
    ],
)
def test_zeros_after_a_cut_share_its_journal_and_continue(
    folder: Path, work: Path, cut: str, case: str, step: str, is_put: bool
) -> None:
    with pytest.raises(CutOffError):
        cut_then_zeros(open_decoder(folder), cut, how(case), Dying(work, step, is_put=is_put))
    continued = cut_then_zeros(open_decoder(folder), cut, how(case), Journal(work))
    assert same(continued, cut_apart(folder, cut, case))


# --- what is checked and said before ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "4:2"}, "pattern '4:2' is out of range; expected N:M"),
        ({"pattern": "half"}, "unknown sparsity pattern 'half'"),
        ({"method": "wnda"}, "unknown sparsity method 'wnda'; did you mean 'wanda'"),
        ({"scope": "attention"}, "unknown --sparsity-scope 'attention'; expected mlp or all"),
        ({"layout": "columns"}, "unknown --sparsity-layout 'columns'; expected hardware or paper"),
        ({"layout": "paper"}, "wanda is none; expected --sparsity-method dass, or --sparsity-layout hardware"),
        ({"refit": "intercept"}, "refit 'intercept' does not know zeros; expected none, least-squares, reconstruct"),
        ({"refit": "bias"}, "refit 'bias' does not know zeros"),
        ({"refit": "best"}, "unknown refit 'best'"),
    ],
)
def test_wrong_value_is_named_with_what_was_expected(changes: dict[str, str], message: str) -> None:
    how("wanda/mlp/hardware/none").check()
    with pytest.raises(EdgepruneError) as refused:
        how("wanda/mlp/hardware/none", **changes).check()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("refit", ["least-squares", "reconstruct"])
def test_refit_wants_sequences_to_keep_aside(refit: str) -> None:
    sparsity = how(f"wanda/mlp/hardware/{refit}")
    sparsity.check_sequences(8)
    with pytest.raises(EdgepruneError, match=rf"refit {refit} .* 7 leave none; raise --calibration-sequences to 8"):
        sparsity.check_sequences(7)
    how("wanda/mlp/hardware/none").check_sequences(1)


@pytest.mark.parametrize(
    ("case", "needs"),
    [
        ("magnitude/mlp/hardware/none", set()),
        ("magnitude/mlp/hardware/least-squares", {"gram"}),
        ("wanda/mlp/hardware/none", {"inputs"}),
        ("dass/mlp/paper/reconstruct", {"inputs", "gram"}),
        ("sparsegpt/mlp/hardware/none", {"gram"}),
    ],
)
def test_products_are_summed_only_where_method_or_refit_read_them(case: str, needs: set[str]) -> None:
    assert how(case).needs == needs


@pytest.mark.parametrize(
    ("name", "case", "words"),
    [
        ("llama", "dass/mlp/hardware/none", ["along a row its score of gate and up is the magnitude alone"]),
        ("phi3", "dass/mlp/hardware/none", ["--sparsity-layout paper is the paper's, which sparse tensor cores can"]),
        ("gpt2", "dass/mlp/hardware/none", ["this MLP has no gate, both its Linears are pruned by Wanda's score"]),
        ("bloom", "dass/all/hardware/none", ["has no gate", "attention, which its paper leaves dense"]),
        ("llama", "dass/mlp/paper/none", ["blocks of gate and up lie along their outputs; no known hardware"]),
        ("llama", "dass/all/paper/none", ["attention, which its paper leaves dense", "no known hardware uses them"]),
        ("llama", "wanda/all/hardware/none", []),
        ("opt", "sparsegpt/all/hardware/none", []),
        ("gpt2", "DaSS/mlp/hardware/none", ["this MLP has no gate"]),  # a name that is found is found in any case
    ],
)
def test_what_a_method_does_otherwise_than_its_paper_is_said(name: str, case: str, words: list[str]) -> None:
    notes = how(case).notes(groups_of(toy(name)))
    assert len(notes) == len(words)
    for note, part in zip(notes, words, strict=True):
        assert part in note


def test_mlp_without_a_gate_has_no_blocks_along_outputs_to_be_told_of() -> None:
    (note,) = how("dass/mlp/paper/none").notes(groups_of(toy("gpt2")))
    assert "has no gate" in note


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def planned(model: Any, sparsity: Sparsity) -> PrunePlan:
    plan = keep_all(model, "toy", calibration())
    record = sparsity.record(groups_of(model))
    return PrunePlan(**{**vars(plan), "sparsity": record})


@pytest.mark.parametrize(
    ("name", "case"), [*((name, "wanda/all/hardware/none") for name in KINDS), ("phi3", "dass/mlp/paper/none")]
)
def test_zeros_are_counted_in_the_file_that_was_written(name: str, case: str, tmp_path: Path) -> None:
    model, sparsity = small(name), how(case)
    sparsify(model, sparsity, calibration())
    plan = planned(model, sparsity)
    saved = save(model, None, plan, layer_widths(groups_of(model), {}), tmp_path / "out")
    assert saved.zeros is not None
    weights = sum(weight_of(linear_of(model, linear)).numel() for linear in plan.sparsity.sides)
    assert (saved.zeros.weights, saved.zeros.broken) == (weights, 0)
    assert saved.zeros.nonzeros == saved.zeros.allowed == weights // 2
    assert saved.zeros.sparsity == saved.zeros.expected_sparsity == 0.5
    assert PrunePlan.load(tmp_path / "out") == plan
    assert not plan.is_cut
    assert plan.parameters_after == plan.parameters_before


def test_model_without_a_pattern_has_no_zeros_to_count(tmp_path: Path) -> None:
    model = toy("llama")
    plan = keep_all(model, "toy", calibration())
    assert save(model, None, plan, layer_widths(groups_of(model), {}), tmp_path / "out").zeros is None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_break_their_pattern_are_not_saved(name: str, tmp_path: Path) -> None:
    model, sparsity = toy(name), how("wanda/mlp/hardware/none")
    sparsify(model, sparsity, calibration())
    last = list(sparsity.record(groups_of(model)).sides)[-1]
    weight = weight_of(linear_of(model, last)).data
    weight[tuple((weight == 0).nonzero()[5].tolist())] = 1e-20
    with pytest.raises(GateError, match=rf"{last} breaks the pattern 2:4 in 1 places") as broken:
        save(model, None, planned(model, sparsity), layer_widths(groups_of(model), {}), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert ".part" not in str(broken.value), "a folder that is no longer there"


def test_earlier_checkpoint_outlives_one_that_breaks_its_pattern(tmp_path: Path) -> None:
    model = toy("llama")
    widths = layer_widths(groups_of(model), {})
    save(model, None, None, widths, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(GateError):
        save(model, None, planned(model, how("wanda/mlp/hardware/none")), widths, tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
