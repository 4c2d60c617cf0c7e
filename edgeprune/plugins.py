"""Plug-ins by file name: a new architecture, importance method or allocation is one new file and no table to edit.

`find("importance", "wanda-sp")` imports `edgeprune/importance/wanda_sp.py`. A name that is a Python keyword ends its
file name with an underscore (`global` lies in `global_.py`). An error inside a plug-in is not swallowed. Other packages
have plug-ins of their own, which they look up under their own name.
"""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

from edgeprune_runtime.errors import EdgepruneError


def names(kind: str, package: str = "edgeprune") -> list[str]:
    """Names of all plug-ins of a kind ("architectures", "importance", "allocation"), sorted; imports none of them."""
    return sorted(_name(stem) for stem in _stems(kind, package))


def find(kind: str, name: str, what: str, package: str = "edgeprune") -> ModuleType:
    """Import the plug-in `name` of a kind; `what` is what a person calls the kind ("importance method").

    Raises:
        EdgepruneError: if there is no such plug-in; the message names the nearest.
    """
    wanted = name.lower().replace("_", "-")
    known = names(kind, package)
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise EdgepruneError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")
    stem = next(stem for stem in _stems(kind, package) if _name(stem) == wanted)
    return importlib.import_module(f"{package}.{kind}.{stem}")


def _stems(kind: str, package: str) -> Iterator[str]:
    """Names of the files of a kind, without their endings."""
    name = f"{package}.{kind}"
    if name in sys.modules:  # its path may have grown since
        folders = sys.modules[name].__path__
    else:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{package} has no {kind}"
        assert spec.submodule_search_locations is not None, f"{kind} of {package} is no folder"
        folders = spec.submodule_search_locations
    for info in pkgutil.iter_modules(folders):
        if not info.name.startswith("_"):
            yield info.name


def _name(stem: str) -> str:
    return stem.rstrip("_").replace("_", "-")
