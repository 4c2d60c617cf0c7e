"""What the tests of the command line compress."""

from pathlib import Path

import pytest
from commandline import SENTENCES, save_toy


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint. Read only."""
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 5,000 letters. Read only."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(SENTENCES * 48)
    return path
