"""What `compress` measured stands in the bundle's card and manifest, which still vouch for each other."""

import json
import shutil
from pathlib import Path

import pytest
from commandline import invoke

from edgeprune_runtime.bundle import open_bundle

SMALL = (
    *("--preset", "fast", "--align", 4, "--min-channels", 4, "--dtype", "float32", "--threads", 1),
    *("--calibration-sequences", 8, "--calibration-tokens", 32, "--eval-window", 32, "--eval-windows", 2),
    *("--rounds", 1, "--prompt-tokens", 8, "--generate-tokens", 4),
)


@pytest.fixture(scope="module")
def output(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card") / "out"
    done = invoke("compress", model_folder, "-c", text_file, "--eval-text", text_file, "-o", out, *SMALL)
    assert done.code == 0, done.err
    return out


def test_card_has_the_measured_results_and_the_manifest_its_hash(output: Path) -> None:
    opened = open_bundle(output / "bundle", verify=True)
    measured = opened.manifest.results["measured"]
    report = json.loads((output / "report.json").read_text())
    assert [list(row.values()) for row in report["tables"][0]["rows"]] == measured["rows"]  # type: ignore[index,call-overload]
    card = (output / "bundle" / "README.md").read_text("utf-8")
    assert "## Results" in card
    assert "| perplexity | " in card
    assert "% of all parameters are gone" in card


def test_card_names_no_folder_of_this_machine(output: Path, text_file: Path, model_folder: Path) -> None:
    for file in ("README.md", "edgeprune.json"):
        text = (output / "bundle" / file).read_text("utf-8")
        assert text_file.name in text
        assert str(text_file.parent) not in text
        assert str(output.parent) not in text
        assert str(model_folder.parent) not in text


@pytest.mark.parametrize("steps", ["compress", "compress, then export"])
def test_texts_of_licence_and_notice_travel_with_the_weights(
    steps: str, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    texts = {"LICENSE.txt": b"Do what you like \xa9", "NOTICE": b"By somebody"}
    for name, text in texts.items():
        (tmp_path / "model" / name).write_bytes(text)
    options = (*SMALL, "--eval-text", text_file, "-o", tmp_path / "out")
    if steps == "compress":
        done = invoke("compress", tmp_path / "model", "-c", text_file, *options, "--keep-dense")
        folders = [tmp_path / "out" / name for name in ("checkpoint", "bundle", "dense")]
    else:
        done = invoke("compress", tmp_path / "model", "-c", text_file, *options, "--checkpoint-only")
        assert done.code == 0, done.err
        done = invoke("export", tmp_path / "out", "-o", tmp_path / "bundle")
        folders = [tmp_path / "out", tmp_path / "bundle"]
    assert done.code == 0, done.err
    for folder in folders:
        assert {name: (folder / name).read_bytes() for name in texts} == texts
        card = (folder / "README.md").read_text("utf-8")
        assert 'license: "other"\nlicense_link: "LICENSE.txt"\n' in card
        assert "See [LICENSE.txt](LICENSE.txt), which came with the model." in card
    assert texts.keys() <= open_bundle(folders[1], verify=True).manifest.files.keys()


def test_licence_and_base_model_come_through_a_checkpoint(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Of `compress --checkpoint-only` and then `export`, which is not told the original model."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# The model\n")
    options = (*SMALL, "--checkpoint-only", "--eval-text", text_file, "-o", tmp_path / "cut")
    done = invoke("compress", tmp_path / "model", "-c", text_file, *options)
    assert done.code == 0, done.err
    done = invoke("export", tmp_path / "cut", "-o", tmp_path / "bundle")
    assert done.code == 0, done.err
    for folder in ("cut", "bundle"):
        card = (tmp_path / folder / "README.md").read_text("utf-8")
        assert card.startswith('---\nbase_model: "a/b"\nlicense: "mit"\n')
        assert "mit, as the original model states it." in card
        assert str(tmp_path) not in card


def test_bundle_runs_after_its_card_was_written_again(output: Path) -> None:
    assert invoke("validate", output / "bundle", "--threads", 1).code == 0
    assert invoke("doctor", output / "bundle", "--verify").code == 0
