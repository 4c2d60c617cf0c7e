"""The code of a model card, as it stands, writes the same in every runtime where texts begin with a special token."""

import contextlib
import io
from pathlib import Path

import javascript
import pytest

from edgeprune_export.exporting import export
from edgeprune_export.snippets import snippets
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.consumers

WORDS = 12
"""Of an answer so many are compared: the programs stop after different numbers of tokens."""


@pytest.fixture(scope="module")
def bundle(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "bundle"
    export(stories260k, folder)
    return folder


def code(bundle: Path, runtime: str) -> str:
    return snippets(open_bundle(bundle).manifest)[runtime].replace("BUNDLE", str(bundle))


def answer(text: str) -> list[str]:
    """The first words after the prompt, which some programs repeat."""
    return text.replace("<s>", "").strip().removeprefix("Water is").split()[:WORDS]


def written_in_python(bundle: Path, runtime: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code(bundle, runtime).replace("range(16)", "range(64)"), runtime, "exec"), {})
    return out.getvalue()


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[str]:
    return answer(written_in_python(bundle, "edgeprune-python"))


def test_texts_begin_with_a_token(bundle: Path, expected: list[str]) -> None:
    opened = open_bundle(bundle)
    assert Tokenizer.load(opened).encode("Water is")[0] == opened.manifest.bos_token_id
    assert len(expected) == WORDS


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_python(runtime: str, bundle: Path, expected: list[str]) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the extra 'genai'")
    assert answer(written_in_python(bundle, runtime)) == expected


def test_transformers_js(bundle: Path, expected: list[str], tmp_path: Path) -> None:
    script = tmp_path / "snippet.mjs"
    script.write_text(code(bundle, "transformers.js"), "utf-8")
    (tmp_path / "run").mkdir()
    done = javascript.run(script, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert answer(done.stdout) == expected
