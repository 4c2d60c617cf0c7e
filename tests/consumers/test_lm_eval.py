"""lm-evaluation-harness, through its two ONNX backends, scores what our runtime and `edgeprune eval` score."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import invoke
from consumed import BUNDLES, VARIANTS, decoder

from edgeprune_runtime.bundle import GENAI_CONFIG_FILE, open_bundle
from edgeprune_runtime.tokenizer import Tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

pytestmark = pytest.mark.consumers

BACKENDS = ("onnxruntime", "onnxruntime-genai")
WINDOWS = 3
# lm-eval sums in float32 over a whole text, we in float64.
RELATIVE = 1e-5

REAL_ROWS, REAL_QUESTIONS = 12, 6
MADE_UP = [
    {"context": "The cook put salt on the", "target": "eggs"},
    {"context": "A ship came home at", "target": "noon"},
    {"context": "Nine and twelve are", "target": "twenty-one"},
    {"context": "Ask a question:", "target": "who sold the red hat?"},
]
QUESTIONS = [
    {"context": "Question: What do bees make?\nAnswer:", "choices": ["honey", "paper money", "glass"], "answer": 0},
    {
        "context": "Question: Where do fish live?\nAnswer:",
        "choices": ["in trees", "in water", "on the moon"],
        "answer": 1,
    },
    {"context": "Question: What is ice made of?\nAnswer:", "choices": ["iron", "salt", "frozen water"], "answer": 2},
]


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


RealRows = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture
def real_rows(request: pytest.FixtureRequest) -> RealRows:
    """Reads the first rows of a file of the test data; none where there are no test data, for it goes without, too."""

    def read(file: str, count: int) -> list[dict[str, Any]]:
        try:
            folder: Path = request.getfixturevalue("data_folder")
        except pytest.skip.Exception:
            return []
        return [json.loads(line) for line in (folder / file).read_text("utf-8").split("\n")[:count]]

    return read


@pytest.fixture
def rows(bundle: Path, toy_bundle: Path, real_rows: RealRows) -> list[dict[str, str]]:
    """Contexts and what follows them; for the real model also of LAMBADA."""
    return MADE_UP if bundle == toy_bundle else [*MADE_UP, *real_rows("text/lambada.jsonl", REAL_ROWS)]


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run lm-eval on a task that is written here, over rows that are written here; nothing is fetched."""

    def run(backend: str, bundle: Path, task: dict[str, Any], rows: Sequence[dict[str, str]], **model: Any) -> Any:
        from lm_eval.tasks import TaskManager

        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (tmp_path / "task.yaml").write_text(
            json.dumps(  # which is YAML too
                {
                    "task": "local",
                    "dataset_path": "json",
                    "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
                    "test_split": "test",
                    **task,
                }
            ),
            "utf-8",
        )
        return lm_eval.simple_evaluate(
            model=backend,
            model_args={"pretrained": str(bundle), **model},
            tasks=["local"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )

    return run


CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": " {{target}}",
    "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


def log_likelihood(bundle: Path, variant: str, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation under our runtime, literally, and whether each of its tokens is the likeliest."""
    tokenizer = Tokenizer.load(open_bundle(bundle, variant))
    before, whole = len(tokenizer.encode(context)), tokenizer.encode(context + continuation)
    logits, _ = decoder(bundle, variant).forward(np.array([whole]))
    total, is_greedy = 0.0, True
    for place in range(before, len(whole)):
        row = logits[0, place - 1].astype(np.float64)
        total += row[whole[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
        is_greedy &= bool(row.argmax() == whole[place])
    return total, is_greedy


def with_default(bundle: Path, variant: str, folder: Path) -> Path:
    """The same bundle (its files linked) whose `genai_config.json`, by which lm-eval finds a graph, names a variant."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    config = json.loads((bundle / GENAI_CONFIG_FILE).read_text("utf-8"))
    config["model"]["decoder"]["filename"] = open_bundle(bundle, variant).variant.graph
    (folder / GENAI_CONFIG_FILE).unlink()
    (folder / GENAI_CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_likelihood_of_every_item(
    backend: str, variant: str, bundle: Path, rows: list[dict[str, str]], scored: Any, tmp_path: Path
) -> None:
    found = scored(backend, with_default(bundle, variant, tmp_path / "bundle"), CLOZE, rows)
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(rows)
    expected = [log_likelihood(bundle, variant, row["context"], f" {row['target']}") for row in rows]
    for sample, (total, is_greedy) in zip(samples, expected, strict=True):
        assert sample["filtered_resps"][0][0] == pytest.approx(total, rel=RELATIVE, abs=1e-4)
        assert bool(sample["filtered_resps"][0][1]) == is_greedy
    results = found["results"]["local"]
    assert results["acc,none"] == pytest.approx(np.mean([is_greedy for _, is_greedy in expected]))
    assert results["perplexity,none"] == pytest.approx(np.exp(-np.mean([total for total, _ in expected])), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_choice_of_every_question(backend: str, smollm2_bundle: Path, real_rows: RealRows, scored: Any) -> None:
    questions = [*QUESTIONS, *real_rows("tasks/arc_easy.jsonl", REAL_QUESTIONS)]
    found = scored(backend, smollm2_bundle, CHOICE, questions)
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    right = []
    for sample, question in zip(samples, questions, strict=True):
        expected = [
            log_likelihood(smollm2_bundle, "fp32", question["context"], f" {choice}")[0]
            for choice in question["choices"]
        ]
        totals = [answer[0] for answer in sample["filtered_resps"]]
        assert totals == pytest.approx(expected, rel=RELATIVE, abs=1e-4)
        right.append(int(np.argmax(expected)) == question["answer"])
    assert found["results"]["local"]["acc,none"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("backend", BACKENDS)
def test_perplexity_of_a_text(backend: str, bundle: Path, scored: Any, tmp_path: Path) -> None:
    """lm-eval's windows of `max_length` tokens are ours: each lays its prefix token aside for want of room."""
    tokenizer = Tokenizer.load(open_bundle(bundle))
    text = " ".join(f"On day {day} the crew counted {7 * day} barrels." for day in range(1, 40))
    while len(tokenizer.encode(text)) % WINDOWS:  # of what is left behind the last window they judge, and we do not
        text = text[:-1]
    tokens = len(tokenizer.encode(text))
    window = tokens // WINDOWS
    (tmp_path / "text.txt").write_text(text, "utf-8")
    done = invoke("eval", bundle, "--text", tmp_path / "text.txt", "--window", window, "--json", "--quiet")
    assert done.code == 0, done.err
    ours = json.loads(done.out.splitlines()[-1])["data"]["eval"]
    assert ours["scored_tokens"] == tokens - WINDOWS
    total = -ours["nll"] * ours["scored_tokens"]

    found = scored(backend, bundle, ROLLING, [{"text": text}], max_length=window)
    [sample] = found["samples"]["local"]
    assert sample["filtered_resps"][0] == pytest.approx(total, rel=RELATIVE)
    theirs = found["results"]["local"]
    assert theirs["byte_perplexity,none"] == pytest.approx(np.exp(-total / len(text.encode())), rel=RELATIVE)
    assert theirs["byte_perplexity,none"] ** (len(text.encode()) / ours["scored_tokens"]) == pytest.approx(
        ours["perplexity"], rel=1e-4
    )
