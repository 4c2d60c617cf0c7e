"""Tiny bundles for the device side's tests."""

import shutil
from pathlib import Path

import pytest
from tiny_bundle import write_bundle


@pytest.fixture(scope="session")
def both_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose graph takes padding anywhere. Read only."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "both")


@pytest.fixture(scope="session")
def right_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose graph takes padding on the right only. Read only."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "right", padding="right")


@pytest.fixture
def folder(both_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(both_folder, tmp_path / "bundle")
