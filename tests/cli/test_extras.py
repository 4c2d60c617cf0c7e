"""A command whose packages are missing says which extra brings them."""

import sys

import pytest

from edgeprune.cli.extras import need
from edgeprune_runtime.errors import EdgepruneError


def test_what_is_installed_is_not_imported_to_find_out() -> None:
    sys.modules.pop("this", None)
    need("compress", "json", "this")
    assert "this" not in sys.modules


def test_what_is_missing_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(
        EdgepruneError, match=r"needs no_such_a, no_such_b, .* pip install 'edgeprune\[genai\]'"
    ) as caught:
        need("genai", "json", "no_such_a", "no_such_b")
    assert caught.value.exit_code == 2
