"""Makes the modules that tests share (`toys`, `cuts`, `tiny_bundle`) importable, and finds real data."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder with real texts and models: `EDGEPRUNE_TEST_DATA`, else `shared/data` beside the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EDGEPRUNE_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set EDGEPRUNE_TEST_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def stories260k(data_folder: Path) -> Path:
    """A really trained Llama of 260,000 parameters, as a folder in Hugging Face form."""
    folder = data_folder / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{data_folder} holds no stories260K")
    return folder
