"""Zeros from the command line: what is written, counted and said, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import baichuan
import pytest
import toys
import zstandard
from commandline import Outcome, invoke
from exported import letter_tokenizer

from edgeprune import checkpoint
from edgeprune.checkpoint import load_pruned
from edgeprune.groups import layer_widths
from edgeprune.journal import Entry, Journal, work_folder
from edgeprune.patterns import Found, Pattern, check_pattern
from edgeprune.plan import PrunePlan
from edgeprune.pruning import model_groups
from edgeprune.shrink import linear_of, weight_of
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.validate import validate

SMALL = (
    *("--preset", "fast", "--align", 4, "--min-channels", 4, "--dtype", "float32", "--threads", 1),
    *("--calibration-sequences", 8, "--calibration-tokens", 32, "--eval-windows", 2),
    *("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4),
)
WANDA = ("--sparsity", "2:4", "--sparsity-method", "wanda", "--refit", "least-squares")


def compress(model: Path, text: Path, output: Path, *arguments: object) -> Outcome:
    return invoke("compress", model, "-c", text, "-o", output, *SMALL, *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found_in(folder: Path) -> Found:
    """What is counted in a checkpoint that is loaded as any other."""
    model, record = load_pruned(folder), PrunePlan.load(folder).sparsity
    assert record is not None
    return check_pattern(record, lambda name: weight_of(linear_of(model, name)), "here")


def said(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return " ".join(text.split())


@pytest.fixture(scope="session")
def stories(data_folder: Path) -> Path:
    path = data_folder / "text" / "tinystories_train_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"{data_folder} holds no {path.name}")
    return path


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(outcome: Outcome, message: str) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert outcome.err.startswith("edgeprune: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that takes long is begun."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the long work was begun")

    for name in ("calibration.gather", "pruning.make_plan", "sparsify.sparsify"):
        monkeypatch.setattr(f"edgeprune.{name}", begun)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "0"), "ratio 0 is out of range; expected the share of all parameters to remove, above 0"),
        (("--ratio", "-0.1", "--sparsity", "2:4"), "ratio -0.1 is out of range"),
        (("--ratio", "0.95", "--sparsity", "2:4"), "ratio 0.95 is out of range"),
        (("--ratio", "nan", "--sparsity", "2:4"), "ratio nan is out of range"),
        (("--sparsity-method", "wanda"), "--sparsity-method goes with --sparsity, which is missing"),
        (("--sparsity-scope", "all"), "--sparsity-scope goes with --sparsity, which is missing"),
        (("--ratio", "0", "--sparsity-layout", "paper"), "--sparsity-layout goes with --sparsity, which is missing"),
        (("--sparsity", "4:2"), "pattern '4:2' is out of range; expected N:M, N weights kept of M in 4, 8, 16"),
        (("--sparsity", "2:5"), "pattern '2:5' is out of range"),
        (("--sparsity", "half"), "unknown sparsity pattern 'half'; expected N:M such as 2:4"),
        (("--sparsity", "1"), "unknown sparsity pattern '1'"),
        (("--sparsity", ""), "unknown sparsity pattern ''"),
        (("--sparsity", "2:4", "--sparsity-method", "sparse-gpt"), "unknown sparsity method 'sparse-gpt'; did you"),
        (("--sparsity", "2:4", "--sparsity-scope", "attention"), "unknown --sparsity-scope 'attention'; expected mlp"),
        (("--sparsity", "2:4", "--sparsity-layout", "rows"), "unknown --sparsity-layout 'rows'; expected hardware or"),
        (
            ("--sparsity", "2:4", "--sparsity-method", "wanda", "--sparsity-layout", "paper"),
            "wanda is none; expected --sparsity-method dass, or --sparsity-layout hardware",
        ),
        (("--sparsity", "2:4", "--refit", "intercept"), "refit 'intercept' does not know zeros; expected none, least"),
        (("--ratio", "0", "--sparsity", "2:4", "--refit", "bias"), "refit 'bias' does not know zeros"),
        (
            ("--ratio", "0", *WANDA, "--calibration-sequences", "7"),
            "7 leave none; raise --calibration-sequences to 8 or more, or use --refit none",
        ),
        (("--ratio", "0", "--sparsity", "2:4", "--max-memory", "10MB"), "the zeros of a block takes about"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_wrong_value(
    model_folder: Path, text_file: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused(compress(model_folder, text_file, tmp_path / "out", *arguments, "-q"), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_work")
def test_mlp_that_cannot_be_reconstructed(text_file: Path, tmp_path: Path) -> None:
    model = toys.toy("opt-narrow", num_hidden_layers=1)
    widths = layer_widths(model_groups(model), {})
    checkpoint.save(model, letter_tokenizer(), None, widths, tmp_path / "opt")
    zeros = ("--ratio", 0, "--sparsity", "2:4", "--sparsity-method", "wanda", "--refit", "reconstruct")
    refused(
        compress(tmp_path / "opt", text_file, tmp_path / "out", *zeros, "-q"),
        "wants an MLP whose output is added to the rest of its block, and this opt model has none",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["opt"]


# --- what is written --------------------------------------------------------------------------------------------------


def test_zeros_alone_make_a_checkpoint_of_the_same_size(stories260k: Path, stories: Path, tmp_path: Path) -> None:
    outcome = compress(stories260k, stories, tmp_path / "out", "--ratio", 0, *WANDA, "--checkpoint-only", "--json")
    assert outcome.code == 0, outcome.err
    plan, dense = PrunePlan.load(tmp_path / "out"), load_pruned(stories260k)
    assert not plan.is_cut
    assert plan.parameters_after == plan.parameters_before == sum(p.numel() for p in dense.parameters())
    assert (plan.sparsity.pattern, plan.sparsity.method, plan.sparsity.scope) == ("2:4", "wanda", "mlp")
    assert len(plan.sparsity.sides) == 3 * dense.config.num_hidden_layers
    found = found_in(tmp_path / "out")
    assert found.broken == 0
    assert found.sparsity == found.expected_sparsity == pytest.approx(0.5)
    report = json.loads(outcome.out.splitlines()[-1])
    assert report["data"]["zeros"] == vars(found)
    assert report["data"]["sparse_refit"].keys() == plan.sparsity.sides.keys()
    assert [table["title"] for table in report["tables"]] == [
        "Zeros in the weights",
        "What the refit of the sparse Linears did",
    ]
    shown = said(outcome.err)
    assert (
        f"zeros in the checkpoint: 50.00% of {found.weights:,} weights, at least 50.00% expected; no block breaks "
        "the pattern" in shown
    )
    assert "ONNX Runtime's CPU kernels multiply by zeros as by other numbers" in shown
    assert "importance of every unit" not in shown
    assert "What stays in each layer" not in shown


@pytest.fixture(scope="module")
def done(stories260k: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One run with a cut and zeros after it. Read only."""
    output = tmp_path_factory.mktemp("sparse") / "out"
    outcome = compress(stories260k, stories, output, "--ratio", 0.2, *WANDA, "--sparsity-scope", "all")
    assert outcome.code == 0, outcome.err
    return output, outcome


def test_zeros_after_a_cut_are_counted_in_the_checkpoint_and_in_the_graph(done: tuple[Path, Outcome]) -> None:
    output, outcome = done
    plan = PrunePlan.load(output / "checkpoint")
    assert plan.is_cut
    assert abs(plan.ratio_reached - 0.2) < 0.01
    found = found_in(output / "checkpoint")
    assert found.broken == 0
    bundle = open_bundle(output / "bundle", verify=True)
    assert bundle.is_sparse
    assert bundle.manifest.results["zeros"] == vars(found)
    assert bundle.manifest.plan["sparsity"]["pattern"] == "2:4"
    validate(bundle, threads=1).ensure_passed()
    for where in ("the checkpoint", "the ONNX graph"):
        assert (
            f"zeros in {where}: {found.sparsity:.2%} of {found.weights:,} weights, at least "
            f"{found.expected_sparsity:.2%} expected; no block breaks the pattern"
        ) in said(outcome.out)


def test_report_has_the_counts_and_what_compression_makes_of_them(done: tuple[Path, Outcome]) -> None:
    output, outcome = done
    report: Any = json.loads((output / "report.json").read_text())
    found = found_in(output / "checkpoint")
    assert report["data"]["zeros"] == vars(found)
    dense, pruned = report["data"]["compressed_bytes"]
    files = [path.read_bytes() for path in (output / "bundle").rglob("*") if path.is_file()]
    assert pruned == pytest.approx(sum(len(zstandard.compress(file)) for file in files), rel=0.01)
    assert pruned < 0.8 * sum(map(len, files))
    assert pruned < 0.7 * dense
    rows = {row[""]: row for row in report["tables"][0]["rows"]}
    plan = PrunePlan.load(output / "checkpoint")
    left = plan.parameters_after - (found.weights - found.nonzeros)
    assert rows["parameters other than zero"]["pruned"] == left
    assert rows["bundle, compressed by zstd, MB"]["pruned"] == pytest.approx(pruned / 1e6)
    assert report["data"]["refit"]
    assert report["data"]["sparse_refit"].keys() == plan.sparsity.sides.keys()
    assert report["data"]["plan"]["sparsity"]["linears"] == len(plan.sparsity.sides)
    assert "sides" not in report["data"]["plan"]["sparsity"]
    for text in (said(outcome.out), (output / "report.md").read_text(), (output / "report.html").read_text()):
        assert "zeros alone win no time and no memory there" in said(text).replace("&#x27;", "'")


def test_dense_report_tells_of_no_zeros(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = compress(
        model_folder, text_file, tmp_path / "out", "--ratio", 0.2, "--refit", "none", "--checkpoint-only", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert "zeros" not in said(outcome.err)
    assert json.loads(outcome.out.splitlines()[-1])["data"].get("zeros") is None
    assert PrunePlan.load(tmp_path / "out").sparsity is None


@pytest.mark.parametrize(
    ("ratio", "zeros", "note"),
    [
        (0, ("--sparsity", "4:8", "--sparsity-method", "dass"), "--sparsity-layout paper is the paper's"),
        (0.2, ("--sparsity", "0.5", "--sparsity-method", "magnitude", "--refit", "none"), "ranked along"),
    ],
)
def test_dry_run_says_where_zeros_would_be_and_writes_nothing(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ratio: float,
    zeros: tuple[str, ...],
    note: str,
) -> None:
    monkeypatch.setattr("edgeprune.sparsify.sparsify", lambda *_, **__: pytest.fail("zeros were put in"))
    outcome = compress(model_folder, text_file, tmp_path / "out", "--ratio", ratio, *zeros, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert not list(tmp_path.iterdir())
    assert "Zeros in the weights" in outcome.out
    assert note in said(outcome.out)
    assert ("What stays in each layer" in outcome.out) == (ratio > 0)


def test_layout_of_the_paper_is_written_and_said_to_fit_no_hardware(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    zeros = ("--sparsity", "2:4", "--sparsity-method", "dass", "--sparsity-layout", "paper", "--refit", "none")
    outcome = compress(model_folder, text_file, tmp_path / "out", "--ratio", 0, *zeros, "--checkpoint-only")
    assert outcome.code == 0, outcome.err
    assert "no known hardware uses them" in said(outcome.out)
    assert found_in(tmp_path / "out").broken == 0
    sides = PrunePlan.load(tmp_path / "out").sparsity.sides
    assert {side for name, side in sides.items() if not name.endswith("down_proj")} == {"out"}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_model_in_a_form_of_its_own_gets_zeros_as_what_it_is_read_as(
    text_file: Path, tmp_path: Path, form: str
) -> None:
    config = baichuan.sizes()
    weights = baichuan.tensors(config)
    folder = baichuan.save(tmp_path / "model", config, weights, form)
    outcome = compress(
        folder, text_file, tmp_path / "out", "--ratio", 0, *WANDA, "--sparsity-scope", "all", "--checkpoint-only", "-q"
    )
    assert outcome.code == 0, outcome.err
    found = found_in(tmp_path / "out")
    assert (found.sparsity, found.broken) == (0.5, 0)
    packed = sum(tensor.numel() for name, tensor in weights.items() if name.endswith("_pack.weight"))
    assert found.weights > packed > 0
    assert "model.layers.0.self_attn.k_proj" in PrunePlan.load(tmp_path / "out").sparsity.sides


def test_pattern_that_is_broken_on_the_way_fails_the_run_and_leaves_nothing(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gate of every later step: a method that forgets a zero."""
    keep = Pattern.keep

    def forgetful(*arguments: Any) -> Any:
        kept = keep(*arguments).clone()
        kept[0, :4] = True
        return kept

    monkeypatch.setattr(Pattern, "keep", forgetful)
    outcome = compress(model_folder, text_file, tmp_path / "out", "--ratio", 0, *WANDA, "--checkpoint-only", "-q")
    assert outcome.code == 1
    assert "breaks the pattern 2:4" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ratio", [0, 0.2])
def test_run_that_was_cut_off_among_the_zeros_continues_to_the_same_bytes(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    arguments = ("--ratio", ratio, *WANDA, "--checkpoint-only")
    undisturbed = compress(model_folder, text_file, tmp_path / "undisturbed", *arguments)
    assert undisturbed.code == 0, undisturbed.err
    put = Journal.put

    def cut_off(journal: Journal, name: str, entry: Entry) -> None:
        put(journal, name, entry)
        if name == "sparse-1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", cut_off)
        assert compress(model_folder, text_file, tmp_path / "out", *arguments).code == 130
    assert not (tmp_path / "out").exists()
    assert (work_folder(tmp_path / "out") / "sparse-1.safetensors").is_file()
    outcome = compress(model_folder, text_file, tmp_path / "out", *arguments)
    assert outcome.code == 0, outcome.err
    assert "continues from block 3 of 4 (zeros in the weights)" in outcome.err
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not work_folder(tmp_path / "out").exists()


def test_zeros_of_another_kind_begin_anew(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeprune.checkpoint.save", stop)
        assert (
            compress(model_folder, text_file, tmp_path / "out", "--ratio", 0, *WANDA, "--checkpoint-only").code == 130
        )
    other = (*WANDA, "--sparsity", "1:4", "--checkpoint-only")
    outcome = compress(model_folder, text_file, tmp_path / "out", "--ratio", 0, *other)
    assert outcome.code == 0, outcome.err
    assert "with another setting; it is discarded" in caplog.text
    assert "continues" not in outcome.err
    assert found_in(tmp_path / "out").sparsity == pytest.approx(0.75)
