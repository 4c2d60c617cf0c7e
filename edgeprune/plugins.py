"""Plug-ins by file name: a new architecture, importance method or allocation is one new file and no table to edit.

`find("importance", "wanda-sp")` imports `edgeprune/importance/wanda_sp.py`. A name that is a Python keyword ends its
file name with an underscore (`global` lies in `global_.py`). An error inside a plug-in is not swallowed.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

from edgeprune_runtime.errors import EdgepruneError


def names(kind: str) -> list[str]:
    """Names of all plug-ins of a kind ("architectures", "importance", "allocation"), sorted."""
    package = importlib.import_module(f"edgeprune.{kind}")
    modules = (info.name for info in pkgutil.iter_modules(package.__path__))
    return sorted(name.rstrip("_").replace("_", "-") for name in modules if not name.startswith("_"))


def find(kind: str, name: str, what: str) -> ModuleType:
    """Import the plug-in `name` of a kind; `what` is what a person calls the kind ("importance method").

    Raises:
        EdgepruneError: if there is no such plug-in; the message names the nearest.
    """
    wanted = name.lower().replace("_", "-")
    known = names(kind)
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise EdgepruneError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")
    package = importlib.import_module(f"edgeprune.{kind}")
    stem = next(
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.rstrip("_").replace("_", "-") == wanted
    )
    return importlib.import_module(f"edgeprune.{kind}.{stem}")
