"""Model cards: what they say, that a stranger's words stay words, and that the code they show runs."""

import contextlib
import io
import itertools
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import invoke
from exported import letter_tokenizer, pruned
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny_bundle import EOS, TEMPLATE, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from edgeprune.groups import LayerWidths
from edgeprune.plan import CalibrationRecord, PrunePlan, SparsityRecord
from edgeprune.sources import Source
from edgeprune_export.exporting import export
from edgeprune_export.genai import genai_config
from edgeprune_export.model_card import (
    CARD_FILE,
    Origin,
    add_results,
    checkpoint_card,
    measured_results,
    model_card,
    plain,
)
from edgeprune_export.snippets import SNIPPETS, optimum_obstacle, snippets
from edgeprune_export.targets import Target, known_targets
from edgeprune_runtime.bundle import Layer, Manifest, ModelInfo, Variant, open_bundle
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.report import Report, Table, Verdict

HOSTILE = (
    "# x\n\n---\n<script>alert(1)</script> ![i](http://e.vil/i.png) [l](javascript:x) `code` **b** | a | $$y$$ &amp; "
    "https://e.vil www.e.vil @all \x1b[31m \u202e \\ _it_ ~~s~~"
)
TAGS = {"h1", "h2", "h3", "p", "ul", "li", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}
PLAN = PrunePlan(
    model="A model",
    model_type="llama",
    method="wanda-sp",
    allocation="protect",
    refit="least-squares",
    ratio_asked=0.2,
    ratio_reached=0.2004,
    parameters_before=1_000,
    parameters_after=800,
    block_parameters_before=500,
    block_parameters_after=300,
    align=32,
    seed=0,
    dtype="float32",
    calibration=CalibrationRecord("some text", 64, 512, "0" * 64),
    edgeprune_version="0.1.0",
    keep={"a": (0,)},
    units={"a": 2},
    notes=("a note of the plan",),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of different widths that reads bytes and has a chat template. Read only."""
    folder = tmp_path_factory.mktemp("card")
    tokenizer = byte_tokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, chat_template=TEMPLATE)
    pruned(
        folder / "toy",
        "llama",
        tokenizer=fast,
        head_dim=16,
        max_position_embeddings=320,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(EOS),
        bos_token_id=None,
    )
    (folder / "toy" / CARD_FILE).write_text(
        "---\nlicense: apache-2.0\nbase_model: someone/something\ntags:\n- x\n---\n\n# A card\n\nlicense: none\n"
    )
    export(folder / "toy", folder / "bundle", name="a toy")
    return folder / "bundle"


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return Manifest.load(bundle)


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def rendered(card: str) -> str:
    body = card.split("---\n", 2)[2]
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body)


def blocks(card: str) -> list[tuple[str, str]]:
    """Language and code of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)


def table(card: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    lines = card.split(f"## {heading}\n", 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| "))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("|---")]


def test_bundle_has_a_card_that_its_manifest_vouches_for(bundle: Path) -> None:
    opened = open_bundle(bundle, verify=True)
    assert CARD_FILE in opened.manifest.files
    assert list(opened.manifest.files) == sorted(opened.manifest.files)
    assert (bundle / CARD_FILE).read_text("utf-8").count("\n# a toy\n") == 1


def test_front_matter_is_valid_for_the_hub(bundle: Path) -> None:
    card = ModelCard.load(bundle / CARD_FILE)
    assert card.data.base_model == "someone/something"
    assert card.data.license == "apache-2.0"
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers.js")
    assert {"onnx", "onnxruntime", "onnxruntime-genai", "edgeprune"} <= set(card.data.tags)


def test_what_the_checkpoint_does_not_state_is_left_out_and_said(manifest: Manifest) -> None:
    card = model_card(manifest)
    assert not {"license", "base_model"} & set(front_matter(card))
    assert "Not stated: that of the base model holds." in card


def test_checkpoint_with_a_licence_file_and_without_a_chat_template(tmp_path: Path) -> None:
    pruned(tmp_path / "toy", "llama", tokenizer=letter_tokenizer(), head_dim=16)
    (tmp_path / "toy" / "LICENSE").write_text("Do what you like.")
    export(tmp_path / "toy", tmp_path / "bundle")
    assert "LICENSE" in open_bundle(tmp_path / "bundle", verify=True).manifest.files
    card = (tmp_path / "bundle" / CARD_FILE).read_text("utf-8")
    stated = front_matter(card)
    assert (stated["license"], stated["license_link"]) == ("other", "LICENSE")
    assert "[LICENSE](LICENSE)" in card
    assert "apply_chat_template" not in card


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", Origin(licence="mit")),
        ("---\nbase_model: 'a/b'\nlicense: \"mit\"\n---\n", Origin("a/b", "mit")),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            Origin(None, "other", "mine", "LICENSE"),
        ),
        ("---\nlicense:\n- mit\nbase_model:\n- a/b\n---\n", Origin()),
        ("# No front matter\n\nlicense: mit\n", Origin()),
        ("text\n---\nlicense: mit\n---\n", Origin()),
        ("---\nlicense: mit\n", Origin()),
        ("", Origin()),
    ],
)
def test_origin_is_read_from_the_front_matter_alone(card: str, expected: Origin, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(card)
    assert Origin.of_folder(tmp_path) == expected


def test_origin_of_a_source(tmp_path: Path) -> None:
    def source(name: str, kind: Any, path: str) -> Source:
        return Source(name, kind, Path(path), "in words", "llama", licence="mit")

    assert Origin.of_source(source("a/b", "hub", "a/b")) == Origin("a/b", "mit")
    assert (
        Origin.of_source(source("smollm2-135m", "gguf", "x.gguf")).base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert Origin.of_source(source("x.gguf", "gguf", "x.gguf")) == Origin(None, "mit")
    (tmp_path / CARD_FILE).write_text("---\nbase_model: c/d\n---\n")
    assert Origin.of_source(source("x", "folder", str(tmp_path))) == Origin("c/d", "mit")


def test_card_of_a_checkpoint_says_what_was_cut_and_hands_its_origin_on(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    stated = "---\nbase_model: a/b\nlicense: other\nlicense_name: mine\nlicense_link: https://mine.example\n---\n"
    (tmp_path / "model" / CARD_FILE).write_text(stated)
    source = Source(str(tmp_path / "model"), "folder", tmp_path / "model", "model (llama)", "llama", licence="other")
    record = SparsityRecord("2:4", "alps", "mlp", "hardware", "none", {"a": "in", "b": "in"})
    widths = (LayerWidths(4, 2, 16, 96), LayerWidths(2, 1, 16, 32))
    card = checkpoint_card(source, replace(PLAN, sparsity=record), widths)
    (tmp_path / CARD_FILE).write_text(card)
    assert Origin.of_folder(tmp_path) == Origin("a/b", "other", "mine", "https://mine.example")
    assert front_matter(card)["library_name"] == "transformers"
    assert front_matter(card)["tags"] == ["edgeprune", "pruned", "sparse"]
    assert "20.0% of all parameters (1,000 became 800)" in card
    assert table(card, "What was removed")[1:] == [["0", "4", "2", "16", "96"], ["1", "2", "1", "16", "32"]]
    assert "Pattern 2:4 in 2 Linears" in card
    assert "other (mine), as the original model states it" in card
    assert str(tmp_path) not in card


def test_card_names_the_file_of_a_licence_that_is_stated_as_well(manifest: Manifest) -> None:
    card = model_card(manifest, Origin(licence="mit"), licence_file="LICENSE")
    assert front_matter(card)["license"] == "mit"
    assert "mit, as the original model states it.\n\nSee [LICENSE](LICENSE), which came with the model." in card
    assert "Not stated" not in card


def test_card_of_a_checkpoint_takes_no_markup_from_strangers() -> None:
    source = Source(HOSTILE, "hub", Path(HOSTILE), HOSTILE, "llama", licence=HOSTILE)
    card = checkpoint_card(source, replace(PLAN, model=HOSTILE, method=HOSTILE), (LayerWidths(4, 2, 16, 96),))
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert set(re.findall(r"<(\w+)", html := rendered(card))) <= TAGS
    assert html.count("<h1") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_dense_model_has_lost_nothing_and_a_cut_one_says_how_much(manifest: Manifest) -> None:
    assert "Nothing: this is the model as it was" in model_card(replace(manifest, plan=None))
    card = model_card(replace(manifest, plan=PLAN.summary()))
    assert "20.0% of all parameters (1,000 became 800), or 40.0% of those of the decoder blocks" in card
    assert "Importance wanda-sp, allocation protect, refit least-squares." in card
    assert "64 x 512 tokens of some text" in card
    assert "- a note of the plan" in card
    assert "pruned" in front_matter(card)["tags"]


def test_plan_reads_the_same_after_a_round_trip_through_json(manifest: Manifest) -> None:
    cut = replace(manifest, plan=PLAN.summary())
    assert model_card(Manifest.from_json(cut.to_json())) == model_card(cut)


def test_neighbouring_layers_of_the_same_widths_share_a_row(manifest: Manifest) -> None:
    wide, narrow = Layer(4, 2, 16, 96), Layer(2, 1, 16, 32)
    rows = table(model_card(replace(manifest, layers=(wide, wide, narrow, wide))), "What was removed")
    assert rows[1:] == [["0-1", "4", "2", "16", "96"], ["2", "2", "1", "16", "32"], ["3", "4", "2", "16", "96"]]


def test_zeros_are_told_as_they_were_counted(manifest: Manifest) -> None:
    record = SparsityRecord("2:4", "alps", "mlp", "hardware", "none", {"a": "in", "b": "in"})
    plan = replace(PLAN, keep={}, parameters_after=1_000, ratio_reached=0.0, sparsity=record)
    counted = {"weights": 1_000, "nonzeros": 500, "allowed": 500, "broken": 0}
    card = model_card(replace(manifest, plan=plan.summary(), results={"zeros": counted}))
    assert "Pattern 2:4 in 2 Linears" in card
    assert "50.00% of 1,000 weights are zero" in card
    assert "No head and no channel" in card
    assert "sparse" in front_matter(card)["tags"]
    assert "pruned" not in front_matter(card)["tags"]


def test_variants_are_told_with_size_parity_and_fidelity(manifest: Manifest) -> None:
    fp32 = manifest.variants["fp32"]
    lost = {"perplexity_ratio": 1.01234, "argmax_agreement": 0.987, "mean_kl": 0.00123, "greedy_flips": 0.25}
    by_blocks = lost | {"greedy_flips": None}
    variants = {"fp32": fp32, "int8": replace(fp32, fidelity=lost), "int4": replace(fp32, fidelity=by_blocks)}
    both = replace(manifest, variants=variants)
    card = model_card(both)
    header, first, second, third = table(card, "Variants")
    megabytes = sum(manifest.files[file].size_bytes for file in (fp32.graph, *fp32.data)) / 1e6
    assert first[:3] == ["fp32 (default)", "`onnx/model.onnx`", f"{megabytes:,.1f}"]
    assert first[4] == f"{fp32.parity['max_abs_error']:.1e}"
    assert first[5:] == ["–"] * 4
    assert second[5:] == ["1.012", "98.7%", "0.00123", "25%"]
    assert third[5:] == ["1.012", "98.7%", "0.00123", "–"]
    assert len(header) == len(first)
    assert "int8" in front_matter(card)["tags"]


def test_results_come_into_card_and_manifest_together(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    figures = Table(
        "Dense against pruned", ("", "dense", "pruned"), (("perplexity", 61.21, 85.06), ("size", 5, None)), (), ("how",)
    )
    report = Report("a report", this_machine(), (figures,), (Verdict("1.39 times", passed=True),))
    sealed = add_results(folder, measured_results(report), Origin("a/b", "mit"))
    opened = open_bundle(folder, verify=True)
    assert opened.manifest == sealed
    assert opened.manifest.results["measured"]["rows"][0] == ["perplexity", 61.21, 85.06]  # type: ignore[index,call-overload]
    card = (folder / CARD_FILE).read_text("utf-8")
    assert table(card, "Results")[1:] == [["perplexity", "61.21", "85.06"], ["size", "5", "–"]]
    assert "- 1.39 times" in card
    assert "- how" in card
    assert front_matter(card)["base_model"] == "a/b"


def test_words_of_a_stranger_stay_words(manifest: Manifest) -> None:
    plan = replace(PLAN, method=HOSTILE, refit=HOSTILE, notes=(HOSTILE, "- list", "1. item", "+ more"))
    record = SparsityRecord(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, {"a": "in"})
    measured = {"columns": [HOSTILE, "b"], "rows": [[HOSTILE, 1]], "notes": [HOSTILE]}
    results = {
        "zeros": {"weights": 1, "nonzeros": 1, "allowed": 1, "broken": 0},
        "measured": {**measured, "verdicts": [HOSTILE], "machine": HOSTILE},
    }
    hostile = replace(
        manifest,
        model=ModelInfo(HOSTILE, HOSTILE, HOSTILE),
        plan=replace(plan, sparsity=record).summary(),
        results=results,
        notes=(HOSTILE,),
    )
    card = model_card(hostile, Origin(HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    assert not {"base_model", "license"} & set(front_matter(card))
    html = rendered(card)
    assert set(re.findall(r"<(\w+)", html)) <= TAGS
    assert html.count("<h1") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert [len(row) for row in table(card.replace("\\|", "/"), "Results")] == [2, 2]


@pytest.mark.parametrize("text", ["- a", "+ a", "1. a", "12) a", "= a", "# a", "> a", "* a"])
def test_note_that_begins_like_markup_is_shown_as_it_is(manifest: Manifest, text: str) -> None:
    html = rendered(model_card(replace(manifest, plan=None, notes=(text,))))
    shown = text.replace(">", "&gt;")
    assert f"<li>{shown}</li>" in html


def test_plain_text_is_one_line_that_renders_as_it_was() -> None:
    text = "a_b *c* [d](e) <f> `g` | h $i$ # j ~k~ & l! \\ https://m www.n o@p {q}"
    escaped = plain(f"{text}\n\nnext\x07line")
    assert "\n" not in escaped
    html = MarkdownIt("commonmark").render(escaped)
    expected = f"{text} next line".replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert html == f"<p>{expected}</p>\n"


def test_card_shows_each_snippet_as_the_tests_run_it(bundle: Path, manifest: Manifest) -> None:
    shown = [code for _, code in blocks((bundle / CARD_FILE).read_text("utf-8"))]
    assert shown == list(snippets(manifest, has_chat=True).values())
    assert "$" not in "".join(shown)


def test_every_python_snippet_compiles_with_and_without_chat(manifest: Manifest) -> None:
    alike = replace(manifest, layers=(Layer(4, 2, 12, 80),), hidden_size=48)
    for has_chat in (True, False):
        for name, code in snippets(alike, has_chat=has_chat).items():
            if SNIPPETS[name].language == "python":
                compile(code, name, "exec")


def run(code: str, bundle: Path) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code.replace("BUNDLE", str(bundle)), "snippet", "exec"), {})
    return out.getvalue()


@pytest.mark.parametrize("has_chat", [True, False])
@pytest.mark.parametrize("runtime", ["edgeprune-python", "onnxruntime", "onnxruntime-genai"])
def test_python_snippet_runs(runtime: str, has_chat: bool, bundle: Path, manifest: Manifest) -> None:
    if runtime == "onnxruntime-genai":
        pytest.importorskip("onnxruntime_genai", reason="needs the extra 'genai'")
    assert run(snippets(manifest, has_chat=has_chat)[runtime], bundle).strip()


def test_snippets_of_two_runtimes_write_the_same(bundle: Path, manifest: Manifest) -> None:
    code = snippets(manifest)
    ours = run(code["edgeprune-python"].replace("max_new_tokens=64", "max_new_tokens=16"), bundle)
    assert run(code["onnxruntime"], bundle) == ours


def test_shell_snippet_of_edgeprune_runs(bundle: Path, manifest: Manifest) -> None:
    for line in snippets(manifest)["edgeprune"].splitlines():
        program, *arguments = shlex.split(line.replace("BUNDLE", str(bundle)))
        assert program == "edgeprune"
        done = invoke(*arguments)
        assert done.code == 0, done.err


def test_snippets_name_the_default_variant(manifest: Manifest) -> None:
    quantised = Variant("onnx/model_q4.onnx", ("onnx/model_q4.onnx_data",), "decoder", 1e-3)
    code = snippets(replace(manifest, default_variant="int4", variants={"int4": quantised}))
    assert "BUNDLE/onnx/model_q4.onnx" in code["onnxruntime"]
    assert 'dtype: "q4"' in code["transformers.js"]
    half = Variant("onnx/model_fp16.onnx", ("onnx/model_fp16.onnx_data",), "decoder", 1e-3)
    assert "np.float16" in snippets(replace(manifest, default_variant="fp16", variants={"fp16": half}))["onnxruntime"]


@pytest.mark.parametrize("target", known_targets())
def test_snippets_run_where_the_target_does(manifest: Manifest, target: str) -> None:
    provider = Target.find(target).provider
    code = snippets(replace(manifest, target=target))
    shown = "" if provider == "cpu" else f" --provider {provider}"
    assert f"edgeprune run BUNDLE{shown} --prompt" in code["edgeprune"]
    assert (f'Decoder(bundle, provider="{provider}")' in code["edgeprune-python"]) == (provider != "cpu")
    assert ('device: "webgpu"' in code["transformers.js"]) == (target == "webgpu")


@pytest.mark.parametrize("target", [None, *known_targets()])
def test_onnxruntime_genai_is_told_the_targets_provider(manifest: Manifest, target: str | None) -> None:
    expected = {"cuda": [{"cuda": {}}], "directml": [{"dml": {}}]}
    config = genai_config(replace(manifest, target=target), variant=manifest.default_variant)
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    assert options == expected.get(target or "", [])


def test_snippets_stay_within_a_short_context(manifest: Manifest) -> None:
    code = snippets(replace(manifest, context_tokens=100))
    assert "max_length=100" in code["onnxruntime-genai"]
    assert "max_length=100 " in code["lm-eval"]


@pytest.mark.parametrize(
    ("model_type", "hidden_size", "layers", "reason"),
    [
        ("llama", 64, [(4, 2, 16), (4, 2, 16)], None),
        ("llama", 64, [(4, 2, 16), (4, 1, 16)], "here they differ"),
        ("llama", 64, [(4, 2, 16), (2, 2, 16)], "here they differ"),
        ("llama", 64, [(2, 1, 16)], "hidden_size / heads = 32 for head_dim, which is 16 here"),
        ("gemma3_text", 64, [(2, 1, 16)], None),
        ("phi3", 64, [(4, 2, 16)], "as many KV heads as query heads, 4, and here are 2"),
        ("gpt2", 64, [(4, 4, 16)], None),
    ],
)
def test_card_says_whether_optimum_can_load_it(
    manifest: Manifest, model_type: str, hidden_size: int, layers: list[tuple[int, int, int]], reason: str | None
) -> None:
    made = replace(
        manifest,
        model=replace(manifest.model, model_type=model_type),
        hidden_size=hidden_size,
        layers=tuple(Layer(*widths, channels=80) for widths in layers),
    )
    found = optimum_obstacle(made)
    assert found is None if reason is None else found is not None and reason in found
    card = model_card(made)
    assert ("ORTModelForCausalLM.from_pretrained" in card) == (reason is None)
    assert reason is None or f"cannot load this model: {found}." in card


def test_every_runtime_has_its_own_snippet() -> None:
    expected = {
        "edgeprune",
        "edgeprune-python",
        "onnxruntime-genai",
        "transformers.js",
        "lm-eval",
        "onnxruntime",
        "optimum",
    }
    assert set(SNIPPETS) == expected
