"""The benchmark scripts start, give Markdown and end with one JSON document; their judging equals a literal version."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import Outcome, run_script
from cuts import groups_of, uniform_keep
from exported import decoder_graph, pruned
from toys import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgeprune.calibration import Calibration
from edgeprune.presets import DEFAULT_PRESET, PRESETS
from edgeprune.shrink import shrink
from edgeprune.sparsify import Sparsity, sparsify
from edgeprune_export.exporting import export
from edgeprune_export.quantize import PRECISIONS
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.errors import EdgepruneError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("main_job", "accuracy", "sparsity", "memory", "speed", "export", "runtime_peers")
TINY_CALIBRATION = ("--calibration-sequences", "8", "--calibration-tokens", "64")
TINY_LLAMA = ("--hidden", "64", "--heads", "4", "--channels", "160", "--vocabulary", "300")


def script(name: str, *arguments: str) -> Outcome:
    return run_script(BENCHMARKS / f"{name}.py", *arguments)


def alone(name: str, *arguments: str) -> Outcome:
    """Run a script in a process of its own, whose memory no other test has used."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def report(name: str, *arguments: str, run: Callable[..., Outcome] = script) -> dict[str, Any]:
    done = run(name, *arguments)
    assert done.code == 0, done.err
    assert done.out.startswith("# ")
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("evaluation", monkeypatch)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("results", monkeypatch)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("memory", monkeypatch)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_is_measured_and_how_to_run_it(name: str) -> None:
    done = script(name, "--help")
    assert done.code == 0, done.err
    assert f"python benchmarks/{name}.py" in done.out


def test_missing_texts_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = script("export", "--data", str(tmp_path))
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert "benchmarks/README.md" in done.err


# --- evaluation -------------------------------------------------------------------------------------------------------


def random_questions(evaluation: Any, count: int = 9) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return list(map(int, torch.randint(3, 97, (length,), generator=generator)))

    return [evaluation.Question(tokens(1, 20), [tokens(1, 9) for _ in range(1 + n % 4)]) for n in range(count)]


def literal_score(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One row of its own for every continuation, all logits, one token at a time."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0]
    nats, greedy = 0.0, True
    for place, token in enumerate(continuation):
        row = logits[len(context) + place - 1]
        nats -= float(row[token] - torch.logsumexp(row, 0))
        greedy = greedy and int(row.argmax()) == token
    return nats, greedy


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3", "smollm3"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_scores_equal_a_forward_pass_for_each_continuation(
    evaluation: Any, monkeypatch: pytest.MonkeyPatch, name: str, batch_tokens: int
) -> None:
    model, questions = toy(name), random_questions(evaluation)
    # Of each first continuation the likeliest token, so that some are greedy.
    with torch.inference_mode():
        for question in questions[::2]:
            best = model(torch.tensor([question.context])).logits[0, -1].argmax()
            question.continuations[0][:] = [int(best)]
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(evaluation, "LOGIT_ROWS", 5)
    progress: list[tuple[int, int]] = []
    scores = evaluation.score(model, questions, lambda *done: progress.append(done), greedy=True)
    assert progress[-1] == (len(questions), len(questions))
    found = [(score.nats, score.is_greedy) for of_question in scores for score in of_question]
    wanted = [literal_score(model, q.context, tokens) for q in questions for tokens in q.continuations]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert any(greedy for _, greedy in wanted)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], rel=1e-5, abs=1e-5)
    unasked = evaluation.score(model, questions, lambda *done: None)
    assert {score.is_greedy for of_question in unasked for score in of_question} == {None}


def test_batches_hold_every_row_once_within_the_budget(evaluation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 20)
    lengths = [3, 30, 7, 7, 1, 9, 10, 2, 5]
    batches = list(evaluation.batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert all(tokens <= 20 or len(batch) == 1 for tokens, batch in zip(padded, batches, strict=True))
    assert len(batches) == 4


def test_a_passage_beyond_the_context_is_refused(evaluation: Any) -> None:
    with pytest.raises(EdgepruneError, match=r"129 tokens.* holds 128"):
        evaluation.score(toy("llama"), [evaluation.Question([5], [[6] * 128])], lambda *done: None)


def test_bfloat16_copy_keeps_rotary_frequencies_and_the_model(evaluation: Any) -> None:
    model = toy("llama-mha")
    judged = evaluation.in_dtype(model, torch.bfloat16)
    assert {parameter.dtype for parameter in judged.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert judged.model.rotary_emb.inv_freq.dtype == torch.float32
    assert judged.lm_head.weight is judged.model.embed_tokens.weight
    assert evaluation.in_dtype(model, torch.float32) is model
    questions = random_questions(evaluation)
    exact, rounded = (evaluation.score(m, questions, lambda *done: None) for m in (model, judged))
    for of_exact, of_rounded in zip(exact, rounded, strict=True):
        assert [s.nats for s in of_rounded] == pytest.approx([s.nats for s in of_exact], rel=0.1, abs=0.2)


def test_choices_are_judged_by_sum_and_by_characters(evaluation: Any) -> None:
    def scored(*nats: float) -> list[Any]:
        return [evaluation.Score(value, None) for value in nats]

    questions = [
        evaluation.Question([1], [[2], [3, 4]], characters=[2, 10], answer=0),
        evaluation.Question([1], [[2], [3, 4]], characters=[2, 10], answer=1),
        evaluation.Question([1], [[2], [3]], characters=[4, 4], answer=1),
    ]
    # Of equals the first is taken.
    result = evaluation.Choices("x", Path(), None).judge(questions, [scored(3, 5), scored(3, 5), scored(2, 2)])
    assert result == {"acc": "100", "acc_norm": "010"}
    assert evaluation.accuracy(result["acc"]) == pytest.approx(1 / 3)


def test_perplexity_weighs_tokens_not_passages(evaluation: Any) -> None:
    assert evaluation.perplexity({"nats": [1.0, 8.0], "tokens": [1, 3]}) == pytest.approx(math.exp(9 / 4))


def test_continuation_is_what_follows_the_tokens_of_the_context(evaluation: Any, stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    asked = evaluation.question(tokenizer, "Once upon a time there was", ["a girl", "two cats"], 1)
    whole = tokenizer("Once upon a time there was two cats")["input_ids"]
    assert [*asked.context, *asked.continuations[1]] == whole
    assert asked.characters == [6, 8]
    assert asked.answer == 1
    # Spaces at the end of the context stand before the continuation.
    assert evaluation.question(tokenizer, "there was ", ["a girl"]).context == tokenizer("there was")["input_ids"]
    with pytest.raises(EdgepruneError, match="no token"):
        evaluation.question(tokenizer, "there was", [""])


def test_windows_do_not_overlap_and_leave_out_the_end(evaluation: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two\nthree\n", "utf-8")
    seen: list[str] = []

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": list(range(11))}

    questions = evaluation.Windows(path, 4, None).questions(tokenizer)
    assert [[*q.context, *q.continuations[0]] for q in questions] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(evaluation.Windows(path, 4, 1).questions(tokenizer)) == 1
    assert seen[0] == "one two\n\n\nthree\n"
    with pytest.raises(EdgepruneError, match="11 tokens"):
        evaluation.Windows(path, 12, None).questions(tokenizer)


@pytest.mark.slow
def test_stories_have_the_perplexity_of_the_model_card(evaluation: Any, data_folder: Path, stories260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    path = data_folder / "text" / "tinystories_train_sample.jsonl"

    def judged(*, every_other: bool) -> Any:
        task = evaluation.Documents(path, 512, None, every_other=every_other)
        questions = task.questions(tokenizer)
        return task.judge(questions, evaluation.score(model, questions, lambda *done: None))

    whole, half = judged(every_other=False), judged(every_other=True)
    assert len(whole["tokens"]) == 317
    assert evaluation.perplexity(whole) == pytest.approx(4.51, abs=0.005)
    assert half["tokens"] == whole["tokens"][1::2]


@pytest.mark.slow
def test_scores_equal_those_of_lm_evaluation_harness(evaluation: Any, data_folder: Path, stories260k: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install edgeprune[eval]")
    from lm_eval.api.instance import Instance

    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    harness: Any = importlib.import_module("lm_eval.models.huggingface")
    reference = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    for task in (
        evaluation.Lambada(data_folder / "text" / "lambada.jsonl", 12),
        evaluation.Choices("arc_easy", data_folder / "tasks" / "arc_easy.jsonl", 12),
    ):
        questions = task.questions(tokenizer)
        found = [s for of_question in evaluation.score(model, questions, print, greedy=True) for s in of_question]
        rows = [json.loads(line) for line in task.path.read_text("utf-8").split("\n")[:12]]
        pairs = [(row["context"], f" {text}") for row in rows for text in row.get("choices") or [row["target"]]]
        asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        wanted = reference.loglikelihood(asked, disable_tqdm=True)
        assert [-s.nats for s in found] == pytest.approx([likelihood for likelihood, _ in wanted], rel=1e-4)
        assert [s.is_greedy for s in found] == [greedy for _, greedy in wanted]


# --- results and recipes ----------------------------------------------------------------------------------------------


def test_results_are_found_again_also_behind_a_line_that_was_cut_off(results: Any, tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"
    first = results.Results(path)
    assert first.find({"a": 1, "b": 2}) is None
    first.add({"a": 1, "b": 2}, {"result": 3, "code": "old"})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": {"a": 2}, "resu')
    second = results.Results(path)
    second.add({"a": 3}, {"result": 4, "code": "new"})
    third = results.Results(path)
    assert third.find({"b": 2, "a": 1})["result"] == 3
    assert third.find({"a": 2}) is None
    assert third.find({"a": 3})["result"] == 4
    assert results.Results(path, code="new").find({"a": 1, "b": 2}) is None


def test_recipes_of_the_table_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = module("recipes", monkeypatch)
    found = recipes.named(recipes.Settings(0.2))
    assert {recipe.kind for recipe in found} == {"other", "fusion", "ours", "trained"}
    assert len({recipe.name for recipe in found}) == len(found)
    assert all(recipe.at(0.5).ratio == 0.5 for recipe in found)
    assert [recipe.name for recipe in found if recipe.settings.recover != "none"] == ["ours, best, recovered"]
    assert recipes.parse_recipe("mine=obs||||lora", recipes.Settings(0.2)).kind == "trained"
    fusion = [recipe.settings for recipe in found if recipe.kind == "fusion"]
    assert len({(s.allocation, s.refit, s.heads) for s in fusion}) == 1


@pytest.mark.parametrize(
    "text", ["obs", "=obs", "a=obs|uniform|none|even|lora|more", "a=obs||||more", "a=obs||maybe", "a=osb", "a=obs|||no"]
)
def test_recipes_that_are_not_understood_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    recipes = module("recipes", monkeypatch)
    with pytest.raises(EdgepruneError):
        recipes.parse_recipe(text, recipes.Settings(0.2))


def test_fusion_is_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = module("accuracy", monkeypatch)

    def row(**values: float) -> Any:
        return SimpleNamespace(values={"perplexity": values})

    trio = [row(s0=10.0, s1=20.0), row(s0=8.0, s1=30.0), row(s0=4.0, s1=40.0)]
    (verdict,) = accuracy._fusion_verdict(0.2, trio)
    assert "1.250 times" in verdict.text
    assert "1 of 2 seeds" in verdict.text


# --- zeros ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["wanda|hardware|none", "a=wanda|none", "a=wanda|hardware|no", "a=osb|hardware|none", "a=wanda|paper|none"],
)
def test_rows_of_zeros_that_are_not_understood_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    sparsity = module("sparsity", monkeypatch)
    with pytest.raises(EdgepruneError):
        sparsity._parse_row(text, "2:4", "mlp")


def test_rows_of_the_table_of_zeros_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = module("sparsity", monkeypatch)
    for pattern, scope in (("2:4", "mlp"), ("0.5", "all")):
        found = dict(sparsity._parse_row(text, pattern, scope) for text in sparsity.ROWS)
        assert len(found) == len(sparsity.ROWS)
        assert {(each.pattern, each.scope) for each in found.values()} == {(pattern, scope)}


@pytest.mark.parametrize(("pattern", "scope", "is_cut"), [
    ("2:4", "mlp", False), ("2:4", "all", False), ("7:16", "all", False), ("0.5", "mlp", False), ("2:4", "mlp", True),
])  # fmt: skip
def test_stored_bytes_are_those_of_the_weights_that_are_kept_and_a_bit_for_each_place(
    monkeypatch: pytest.MonkeyPatch, pattern: str, scope: Any, is_cut: bool
) -> None:
    sparsity, model = module("sparsity", monkeypatch), toy("llama-bias")
    groups = groups_of(model)
    keep = uniform_keep(groups, kv_heads=1, share=2, channels=32) if is_cut else {}
    how = Sparsity(pattern, "magnitude", scope, "hardware", "none")
    found, dense = sparsity.stored_bytes(model, keep, how), sparsity.stored_bytes(model, keep, None)
    if is_cut:
        shrink(model, groups, keep)
    sparsify(model, how, Calibration(torch.zeros(1, 4, dtype=torch.int64), "test", 0, ""))
    names = how.record(groups_of(model)).sides
    places = sum(model.get_submodule(name).weight.numel() for name in names)
    zeros = sum(int((model.get_submodule(name).weight == 0).sum()) for name in names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert dense == 2 * parameters
    assert found == 2 * (parameters - zeros) + places / 8


def test_zeros_are_measured_once_where_two_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsity = module("sparsity", monkeypatch)
    dass, wanda = (Sparsity("2:4", method, "all", "hardware", "none") for method in ("dass", "wanda"))
    assert sparsity._same_as(dass) == sparsity._same_as(wanda) == wanda
    paper = replace(dass, layout="paper")
    assert sparsity._same_as(paper) == paper


# --- runtime peers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def peer_tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("peer_tables", monkeypatch)


@pytest.fixture
def peer_graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    return module("peer_graphs", monkeypatch)


def test_speed_is_compared_round_by_round(peer_tables: Any) -> None:
    ours = [10.0, 20.0, 40.0, 10.0, 30.0]
    found = peer_tables.Ratio.paired(ours, [1.5 * ms for ms in ours])
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.reaches(1.3)
    assert not found.reaches(2.0)
    noisy = peer_tables.Ratio.paired([1.0] * 5, [0.8, 0.9, 1.0, 1.1, 1.2])
    assert noisy.low < noisy.ratio == 1.0 < noisy.high
    assert noisy.reaches(1.0)  # not shown to be slower
    assert not noisy.reaches(1.1)
    few = peer_tables.Ratio.paired([1.0, 1.0], [2.0, 2.0])
    assert (few.ratio, few.low, few.reaches(1.3)) == (2.0, None, None)


def test_a_token_reads_the_head_but_not_the_embedding(peer_graphs: Any, tmp_path: Path) -> None:
    for name, is_tied in (("llama", False), ("llama-mha", True)):
        model = pruned(tmp_path / name, name)
        graph = peer_graphs.read_graph(decoder_graph(tmp_path / name, tmp_path / f"{name}-graph"))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        read = parameters if is_tied else parameters - model.get_input_embeddings().weight.numel()
        assert graph.token_bytes == pytest.approx(4 * read, rel=0.005)  # and a few constants
        assert graph.size_bytes > 4 * parameters
        assert (graph.block, graph.accuracy_level) == (None, None)


def test_other_accuracy_levels_share_all_but_the_level(peer_graphs: Any, tmp_path: Path) -> None:
    pruned(tmp_path / "checkpoint", "llama")
    precision = replace(PRECISIONS["int4"], block_size=16, max_perplexity_ratio=1e9, min_argmax_agreement=0.0)
    export(tmp_path / "checkpoint", tmp_path / "bundle", precisions=[precision])
    graph = peer_graphs.read_graph(open_bundle(tmp_path / "bundle").graph_path)
    twin = peer_graphs.at_level(graph, 0, tmp_path / "twin")
    assert (graph.accuracy_level, twin.accuracy_level) == (4, 0)
    assert (twin.block, twin.token_bytes) == (graph.block, graph.token_bytes) == ((4, 16, False), graph.token_bytes)
    assert graph.table_bits == 8
    assert graph.stored_as(PRECISIONS["int4"]) == replace(PRECISIONS["int4"], block_size=16)
    export(tmp_path / "checkpoint", tmp_path / "small", precisions=[replace(precision, table_bits=4)])
    small = peer_graphs.read_graph(open_bundle(tmp_path / "small").graph_path)
    assert small.stored_as(PRECISIONS["int4"]).tables.bits_per_weight == 4 + 36 / 16
    assert [file.read_bytes() for file in twin.data] == [file.read_bytes() for file in graph.data]
    assert peer_graphs.at_level(graph, 0, tmp_path / "twin") == twin


def test_load_of_what_was_packed_is_held_against_what_it_was_packed_from(peer_tables: Any, tmp_path: Path) -> None:
    (tmp_path / "graph").write_bytes(bytes(240))
    plain = peer_tables.Model("ours int4", "onnx", tmp_path, (tmp_path / "graph",), 100, 10, 8, 4)
    packed = replace(plain, name="ours int4, packed here", unpacked_bytes=100)
    cold = {"rss_before_bytes": 50, "load_peak_rss_bytes": 150, "load_peak_anonymous_bytes": 20}
    cold |= {"load_peak_file_bytes": 80, "load_ms": 1.0, "first_token_ms": 2.0, "is_cold": True}
    found = {"cold": cold, "load_ms": 1.0}
    table, verdicts = peer_tables._load_table([plain, packed], [{plain.name: found, packed.name: found}])
    column = table.columns.index("(peak - before) / files")
    assert [row[column] for row in table.rows] == pytest.approx([100 / 240, 1.0])
    assert "takes 1.00 times the files it was packed from" in verdicts[1].text
    assert verdicts[1].passed


@pytest.mark.parametrize(
    ("option", "words"),
    [("--mobius-python", "mobius-onnx==0.1.0"), ("--llama-python", "llama-cpp-python==0.3.36")],
)
def test_peers_that_were_asked_for_and_are_missing_are_refused_with_how_to_get_them(option: str, words: str) -> None:
    done = script("runtime_peers", option, sys.executable, "--model", "none")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert words in done.err


@pytest.mark.slow
def test_runtime_peers_go_on_where_they_stopped_and_say_who_is_missing(stories260k: Path, tmp_path: Path) -> None:
    job = ("--model", str(stories260k), "--work", str(tmp_path), "--prompt-tokens", "8", "--generate-tokens", "4")
    first = report("runtime_peers", *job, "--rounds", "2")
    measured = (tmp_path / "rounds.jsonl").read_text("utf-8")
    again = report("runtime_peers", *job, "--rounds", "2")
    assert (tmp_path / "rounds.jsonl").read_text("utf-8") == measured
    assert again["tables"] == first["tables"]
    assert first["data"]["missing"] == ["genai builder", "mobius-onnx", "llama.cpp", "pruned"]
    tables = {table["title"]: table["rows"] for table in first["tables"]}
    speed = {row["model"]: row for row in tables["Speed and what rounding costs"]}
    assert set(speed) == {
        *("ours fp32", "ours int8", "ours int8, level 0", "ours int4", "ours int4, level 0"),
        *("ours fp32, packed here", "ours int8, packed here", "ours int4, packed here"),
    }
    for name in ("ours fp32", "ours int8", "ours int4"):
        packed = speed[f"{name}, packed here"]
        assert packed["perplexity / ours fp32"] == speed[name]["perplexity / ours fp32"]
    assert speed["ours fp32"]["same likeliest token"] == 1.0
    assert 1.0 < speed["ours int4, level 0"]["perplexity / ours fp32"] < 1.5
    assert all(row["share of the floor"] > 0 for row in tables["Decode against the memory's floor"])
    assert [row["wanted"] for row in tables["Ours against others, paired by round"]] == [None] * 10
    load = {row["model"]: row for row in tables["Load"]}
    if Path("/proc/self/status").exists():
        assert 0 < load["ours int4"]["of its own / files"] < load["ours int4"]["(peak - before) / files"] * 1.1
    assert load["ours int4, packed here"]["files, MB"] > load["ours int4"]["files, MB"]
    assert all("pip" in row["how to get it"] or "edgeprune" in row["how to get it"] for row in tables["Not measured"])


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_measures_once_what_is_equal_and_goes_on_where_it_stopped(
    data_folder: Path, stories260k: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    common = (
        *("--model", str(stories260k), "--data", str(data_folder), *TINY_CALIBRATION, "--results", str(path)),
        *("--windows", "2", "--window", "64", "--dtype", "float32", "--eval-dtype", "float32"),
        *("--recipe", "a=magnitude||none", "--recipe", "b=magnitude|protect|none", "--recipe", "c=magnitude|uniform"),
    )

    def measured() -> list[Any]:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]

    first = report("accuracy", *common, "--ratios", "0.1", "0.2")
    dense, a, b, c = first["tables"][1]["rows"]
    assert dense["times dense"] == 1.0
    assert dense["perplexity"] < a["perplexity"] == b["perplexity"] != c["perplexity"]
    assert len(measured()) == 1 + 2 * 2  # dense, and two recipes that differ at two ratios

    more = (*common, "--ratios", "0.2", "--seeds", "0", "1", "--lambada", "4", "--arc-easy", "4")
    shown = report("accuracy", *more, "--only-table")
    assert len(measured()) == 5
    assert len(shown["data"]["missing"]) == 5 * 3 - 3
    second = report("accuracy", *more)
    assert second["data"]["missing"] == []
    assert len(measured()) == 5 + 5 * 3 - 3
    third = report("accuracy", *more)
    assert third["tables"] == second["tables"]
    assert len(measured()) == 5 + 5 * 3 - 3
    assert set(second["data"]["ratios"]["0.2"]["c"]["values"]["ARC-easy norm"]) == {"0", "1"}
    assert "(" in second["tables"][0]["rows"][3]["perplexity"]


@pytest.mark.slow
def test_accuracy_calibrates_on_one_half_of_the_documents_and_judges_the_other(
    data_folder: Path, stories260k: Path, tmp_path: Path
) -> None:
    stories = data_folder / "text" / "tinystories_train_sample.jsonl"
    found = report(
        *("accuracy", "--model", str(stories260k), "--documents", str(stories), "--windows", "all"),
        *(*TINY_CALIBRATION, "--results", str(tmp_path / "results.jsonl")),
        *("--recipe", "a=wanda-sp|uniform:mixed|none|even", "--recipe", "b=wanda-sp|uniform:mixed||even"),
        *("--recipe", "c=wanda-sp|uniform:mixed||even|lora"),
    )
    dense, plain, refitted, recovered = found["tables"][0]["rows"]
    assert dense["perplexity"] == pytest.approx(4.5, abs=0.2)
    assert dense["perplexity"] < recovered["perplexity"] < refitted["perplexity"] < plain["perplexity"]
    assert plain["removed / all"] == refitted["removed / all"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.slow
def test_accuracy_judges_cuts_that_are_not_refitted(data_folder: Path, stories260k: Path, tmp_path: Path) -> None:
    found = report(
        *("accuracy", "--model", str(stories260k), "--data", str(data_folder), *TINY_CALIBRATION),
        *("--windows", "2", "--window", "64", "--dtype", "float32", "--eval-dtype", "float32"),
        *("--results", str(tmp_path / "results.jsonl"), "--recipe", "a=magnitude|judged:obs|none"),
    )
    dense, judged = found["tables"][0]["rows"]
    assert dense["perplexity"] < judged["perplexity"]


@pytest.mark.slow
def test_accuracy_refuses_a_recipe_it_does_not_understand(data_folder: Path) -> None:
    done = script("accuracy", "--data", str(data_folder), "--recipe", "a=magnitude||maybe")
    assert done.code == 2
    assert "least-squares" in done.err


@pytest.mark.slow
def test_zeros_are_measured_and_shown_again(data_folder: Path, stories260k: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    common = (
        *("sparsity", "--model", str(stories260k), "--data", str(data_folder), *TINY_CALIBRATION),
        *("--windows", "2", "--window", "64", "--dtype", "float32", "--eval-dtype", "float32", "--results", str(path)),
    )
    rows = ("--row", "a=wanda|hardware|none", "--row", "b=dass|hardware|none", "--row", "c=dass|paper|least-squares")

    def measured() -> int:
        return len(list(filter(None, path.read_text("utf-8").split("\n"))))

    first = report(*common, *rows, "--patterns", "2:4", "0.5", "--seeds", "0", "1")
    assert measured() == 1 + 2 * 2 * 2  # dense; two rows that differ, patterns, seeds
    assert [table["title"] for table in first["tables"]] == ["2:4, MLPs", "0.5, MLPs"]
    a, b, c = (row["perplexity"] for row in first["tables"][0]["rows"])
    assert a == b != c
    assert "(" in a
    again = report(*common, *rows, "--patterns", "2:4", "0.5", "--seeds", "0", "1", "--only-table")
    assert again["tables"] == first["tables"]
    assert measured() == 9


@pytest.mark.slow
def test_zeros_and_cuts_are_compared_at_equal_bytes(data_folder: Path, stories260k: Path, tmp_path: Path) -> None:
    found = report(
        *("sparsity", "--model", str(stories260k), "--data", str(data_folder), *TINY_CALIBRATION, "--bytes"),
        *("--windows", "2", "--window", "64", "--row", "a=wanda|hardware|none"),
        *("--results", str(tmp_path / "results.jsonl")),
    )
    rows = {row["row"]: row for row in found["tables"][0]["rows"]}
    alone, cut = rows["2:4 of all Linears, nothing cut"], rows["cut alone"]
    assert alone["cut"] == "0.0%"
    for name in ("cut alone", "cut, then 2:4 of the MLPs"):
        assert 0.9 * alone["stored, MB"] < rows[name]["stored, MB"] <= alone["stored, MB"]
    assert float(cut["cut"].rstrip("%")) > float(rows["cut, then 2:4 of the MLPs"]["cut"].rstrip("%")) > 0


def test_memory_makes_checkpoints_that_load_and_stay_finite(memory: Any, tmp_path: Path) -> None:
    shape = memory.Shape(hidden=64, heads=4, kv_heads=2, channels=160, vocabulary=300)
    memory.make_checkpoints(shape, tmp_path, [1, 3], 32)
    memory.write_words(tmp_path / "words.txt", 1000)
    for blocks in (1, 3):
        folder = tmp_path / f"{blocks}-blocks"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert shape.stored_bytes(blocks) == 2 * sum(parameter.numel() for parameter in model.parameters())
        ids = AutoTokenizer.from_pretrained(folder)((tmp_path / "words.txt").read_text("utf-8"))["input_ids"]
        assert len(ids) >= 1250
        with torch.inference_mode():
            assert bool(model(torch.tensor([ids[:256]])).logits.isfinite().all())


def test_memory_measures_a_process_and_not_its_parent(memory: Any) -> None:
    code = "import time; held = bytearray(b'1') * 200_000_000; time.sleep(0.5); print('said')"
    usage, said = memory.run([sys.executable, "-c", code])
    assert said == "said\n"
    assert usage.wall_s > 0.5
    assert usage.wall_s > usage.cpu_s > 0
    assert 200e6 < usage.peak_anonymous_bytes <= usage.peak_rss_bytes
    with pytest.raises(EdgepruneError, match="exit code 3"):
        memory.run([sys.executable, "-c", "raise SystemExit(3)"])


def memory_run(
    memory: Any, blocks: int, *, wall_s: float, peak_gb: float, estimate_gb: float | None = None, keeps: bool = False
) -> Any:
    usage = memory.Usage(wall_s=wall_s, cpu_s=wall_s, peak_rss_bytes=int(peak_gb * 1e9), peak_anonymous_bytes=0)
    footprint = {"peak_bytes": int(estimate_gb * 1e9), "keeps_blocks": keeps} if estimate_gb is not None else None
    return memory.Run(blocks, 10 * blocks, usage, footprint)


def test_memory_draws_a_line_through_the_runs(memory: Any) -> None:
    runs = [memory_run(memory, blocks, wall_s=5.0 + 2.0 * blocks, peak_gb=1.0) for blocks in (2, 4, 8)]
    found = memory.make_report("title", runs, 32, 6.0, {})
    assert found.data["whole_s"] == pytest.approx(69.0)
    assert [verdict.passed for verdict in found.verdicts] == [True, True, None]
    grown = [memory_run(memory, blocks, wall_s=1.0, peak_gb=blocks) for blocks in (2, 8)]
    assert [v.passed for v in memory.make_report("title", grown, 32, 6.0, {}).verdicts] == [False, False, None]


def test_memory_holds_peaks_against_what_was_reckoned_with(memory: Any) -> None:
    runs = [memory_run(memory, blocks, wall_s=1.0, peak_gb=1.0, estimate_gb=1.25) for blocks in (4, 8)]
    _, below, *_ = memory.make_report("title", runs, 32, 6.0, {}).verdicts
    assert below.passed
    assert "80%" in below.text
    above = [*runs, memory_run(memory, 16, wall_s=1.0, peak_gb=1.01, estimate_gb=1.0)]
    assert memory.make_report("title", above, 32, 6.0, {}).verdicts[1].passed is False


def test_memory_lets_blocks_that_stay_take_their_room(memory: Any) -> None:
    runs = [memory_run(memory, blocks, wall_s=1.0, peak_gb=blocks, estimate_gb=9, keeps=True) for blocks in (2, 4)]
    found = memory.make_report("title", runs, 32, 6.0, {})
    assert [row[-1] for row in found.tables[0].rows] == ["yes", "yes"]
    assert [verdict.passed for verdict in found.verdicts] == [True, True, None]
    assert "growth_bytes" not in found.data


@pytest.mark.slow
def test_memory_goes_on_after_the_last_finished_run(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(_args: object, _shape: object, blocks: int) -> Any:
        measured.append(blocks)
        if measured == [2, 4]:
            raise EdgepruneError("interrupted")
        return memory_run(memory, blocks, wall_s=blocks, peak_gb=1.0, estimate_gb=2.0)

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--folder", str(tmp_path), "--blocks", "2", "4", *TINY_LLAMA])
    with pytest.raises(EdgepruneError, match="interrupted"):
        memory.main()
    found = memory.main()
    assert measured == [2, 4, 4]
    assert [row[2] for row in found.tables[0].rows] == [2.0, 4.0]
    assert not list(tmp_path.iterdir())


def test_memory_measures_an_interrupted_run_from_its_beginning(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "2-blocks-export" / ".output.work"
    left.mkdir(parents=True)

    def run(command: list[str]) -> Any:
        assert command[-2:] == ["-o", str(left.with_name("output"))]
        assert not left.exists()
        return memory_run(memory, 2, wall_s=1.0, peak_gb=1.0).usage, ""

    monkeypatch.setattr(memory, "run", run)
    asked = SimpleNamespace(folder=tmp_path, job="export", max_memory="1GB", options=[])
    memory.measure(asked, memory.Shape(hidden=64, heads=4, kv_heads=2, channels=160, vocabulary=300), 2)
    assert not left.parent.exists()


@pytest.mark.slow
def test_memory_compresses_each_number_of_blocks_as_a_user_gets_it(tmp_path: Path) -> None:
    found = report(
        *("memory", "--folder", str(tmp_path), "--blocks", "2", "4", *TINY_LLAMA, *TINY_CALIBRATION),
        *("--", "--min-channels", "32"),
    )
    assert [row["blocks"] for row in found["tables"][0]["rows"]] == [2, 4]
    for run in found["data"]["runs"]:
        assert run["usage"]["peak_rss_bytes"] > 50e6
        assert run["footprint"]["peak_bytes"] > 50e6
        assert (run["plan"]["method"], run["plan"]["allocation"], run["plan"]["refit"]) == (
            PRESETS[DEFAULT_PRESET].method,
            PRESETS[DEFAULT_PRESET].allocation,
            PRESETS[DEFAULT_PRESET].refit,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_exports_by_blocks(tmp_path: Path) -> None:
    job = ("--job", "export", "--blocks", "1", "2", "--max-memory", "1MB")
    found = report("memory", "--folder", str(tmp_path), *job, *TINY_LLAMA, *TINY_CALIBRATION)
    assert [row["blocks"] for row in found["tables"][0]["rows"]] == [1, 2]
    assert "Exporting to int4" in found["title"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_says_what_compress_said(tmp_path: Path) -> None:
    arguments = ("--folder", str(tmp_path), "--blocks", "2", *TINY_LLAMA, *TINY_CALIBRATION, "--max-memory", "1MB")
    done = script("memory", *arguments)
    assert done.code == 2
    assert "--max-memory" in done.err
    assert "exit code 2" in done.err.splitlines()[-1]


@pytest.mark.slow
def test_job_then_speed(data_folder: Path, stories260k: Path, tmp_path: Path) -> None:
    text = str(data_folder / "text" / "calib_c4.jsonl")
    latency = ("--prompt-tokens", "8", "--generate-tokens", "4")
    job = report(
        *("main_job", "--model", str(stories260k), "-o", str(tmp_path / "job"), "--"),
        *("--calibration", text, *TINY_CALIBRATION, *latency, "--rounds", "1", "--keep-dense"),
        run=alone,
    )
    figures, seconds = job["data"]["figures"], job["data"]["seconds"]
    assert sum(seconds.values()) == pytest.approx(figures["wall_s"])
    assert figures["process_tree_peak_rss_bytes"] > 0.8 * figures["largest_process_peak_rss_bytes"] > 50e6
    bundles = ("--dense", str(tmp_path / "job" / "dense"), "--pruned", str(tmp_path / "job" / "bundle"))
    speed = report("speed", *bundles, "--rounds", "3", *latency)
    assert {"prefill", "decode"} <= {ratio["name"] for ratio in speed["data"]["bench"]["ratios"]}


@pytest.mark.slow
def test_export_compares_both_graphs_with_torch(data_folder: Path, stories260k: Path) -> None:
    found = report(
        *("export", "--checkpoint", str(stories260k), "--data", str(data_folder)),
        *("--rounds", "1", "--windows", "1", "--window", "32"),
    )
    differences = found["data"]["differences"]
    assert set(differences) == {"torch - decoder", "torch - traced", "decoder - traced"}
    assert all(0.0 < difference < 1e-3 for difference in differences.values())
