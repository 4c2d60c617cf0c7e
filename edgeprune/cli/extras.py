"""Says which extra to install when a command needs packages that the base install does not bring."""

import importlib.util

from edgeprune_runtime.errors import EdgepruneError


def need(extra: str, *modules: str) -> None:
    """Check that the top-level `modules` can be imported, without importing them.

    Raises:
        EdgepruneError: if one is missing; the message is the command that installs `extra`.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise EdgepruneError(
            f"this command needs {', '.join(missing)}, which the base install leaves out; "
            f"install with: pip install 'edgeprune[{extra}]'"
        )
