"""What a bundle is made for: presets of variants, operators and packaging, chosen by `--target`.

One file per target; to add one, imitate `cpu.py`, or `mobile.py` for files of its own:

1. the first line of its docstring, without the full stop, is its title: what it makes, for a list of targets;
2. `PROVIDER` is the key of `edgeprune_runtime.session.PROVIDERS` that runs it;
3. `PRECISIONS` names its variants, the folder's default first;
4. `NOTES` are sentences for whoever gets the bundle, `VERIFIED` is one on what was run where, and what was not; both go
   into the manifest;
5. `GRAPH_SOURCE` (optional) is the graph that the provider needs, of `graph_sources.GRAPH_SOURCES`; without it, the
   architecture's own. A user who asks for another is refused: nothing here is a matter of taste;
6. `DETAILS` (optional) holds by precision what is to be other than usual: those of `quantize.DETAILS`;
7. `MAX_DATA_BYTES` (optional) is how large the weights of a variant may be;
8. `package(folder, manifest)` (optional) adds files to a complete bundle before it is sealed, and returns the manifest,
   with what there is to say of them.

What the user gives himself wins over `PRECISIONS` and `DETAILS`. Every graph passes the gates with the CPU provider,
whatever its target.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune import plugins
from edgeprune.configs import architecture
from edgeprune_export.graph_sources import graph_source_of
from edgeprune_export.quantize import FLOAT32, PRECISIONS, Precision, as_options, parse_precisions
from edgeprune_runtime.bundle import GraphSource, Manifest
from edgeprune_runtime.errors import EdgepruneError

PACKAGE, KIND = "edgeprune_export", "targets"


@dataclass(frozen=True)
class Target:
    """What a file of this folder says; `title` is the first line of its docstring."""

    name: str
    title: str
    provider: str
    precisions: tuple[str, ...]
    notes: tuple[str, ...]
    verified: str
    graph_source: str = "auto"
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_data_bytes: int | None = None
    package: Callable[[Path, Manifest], Manifest] | None = None

    @classmethod
    def find(cls, name: str) -> "Target":
        """The target of this name.

        Raises:
            EdgepruneError: if there is none; the message lists all, with their titles.
        """
        if name.lower().replace("_", "-") not in known_targets():
            known = "; ".join(f"{each} ({cls.find(each).title})" for each in known_targets())
            raise EdgepruneError(f"unknown --target {name!r}; expected one of: {known}")
        module = plugins.find(KIND, name, "target", PACKAGE)
        title = (module.__doc__ or "").partition("\n")[0].removesuffix(".")
        return cls(
            name=name.lower().replace("_", "-"),
            title=title[:1].lower() + title[1:],
            provider=module.PROVIDER,
            precisions=module.PRECISIONS,
            notes=module.NOTES,
            verified=module.VERIFIED,
            graph_source=getattr(module, "GRAPH_SOURCE", "auto"),
            details=getattr(module, "DETAILS", {}),
            max_data_bytes=getattr(module, "MAX_DATA_BYTES", None),
            package=getattr(module, "package", None),
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the manifest of a bundle says of its target."""
        return (f"made for the target {self.name}: {self.title}", *self.notes, f"verified: {self.verified}")

    def check_size(self, parameters: int, precisions: Sequence[Precision]) -> None:
        """Check that the weights of each variant are as small as the target needs them; call it before any long work.

        Raises:
            EdgepruneError: naming the variant that is too large, and one that is not.
        """
        if self.max_data_bytes is None:
            return
        sizes = {each.name: round(parameters * each.bits_per_weight / 8) for each in PRECISIONS.values()}
        fitting = [name for name, size in sizes.items() if size <= self.max_data_bytes]
        for precision in precisions:
            size = round(parameters * precision.bits_per_weight / 8)
            if size > self.max_data_bytes:
                advice = f"use --precision {fitting[-1]}" if fitting else "take a smaller model, or a higher --ratio"
                raise EdgepruneError(
                    f"the {precision.name} weights would take {size / 1e9:.1f} GB, and --target {self.name} holds "
                    f"{self.max_data_bytes / 1e9:.1f} GB; {advice}"
                )


@dataclass(frozen=True)
class Choice:
    """What is to be exported: the graph, its variants, and whom for; `notes` say what differs from what was wished."""

    target: Target | None
    graph_source: GraphSource
    precisions: tuple[Precision, ...]
    notes: tuple[str, ...] = ()


def known_targets() -> list[str]:
    """Names of all targets, sorted."""
    return plugins.names(KIND, PACKAGE)


def check_names(target: str | None, precision: str | None, **details: Any) -> None:
    """Check that a target and precisions exist and take the details, as far as that can be said without a model.

    Raises:
        EdgepruneError: naming what is unknown, or would change nothing.
    """
    parse_precisions(_names(None if target is None else Target.find(target), precision), **details)


def choose(
    target: str | None,
    model_type: str,
    *,
    graph_source: str = "auto",
    precision: str | None = None,
    **details: Any,
) -> Choice:
    """What a target (None: none) and what the user gave himself amount to, for models of a type.

    Args:
        target: Name of a file of this folder.
        model_type: Of the model's config.
        graph_source: Of `graph_sources.GRAPH_SOURCES`; "auto" leaves it to the target, then to the architecture.
        precision: Names of variants, joined by commas; None leaves them to the target, else float32.
        details: Those of `quantize.DETAILS`; None, or nothing, leaves one to the target, then to the precision.

    Raises:
        EdgepruneError: if something of it is unknown, or contradicts the rest.
    """
    chosen = None if target is None else Target.find(target)
    source = _source(chosen, model_type, graph_source)
    precisions = parse_precisions(_names(chosen, precision), **details)
    if chosen is None:
        return Choice(None, source, precisions)
    precisions = tuple(
        replace(
            each, **{key: value for key, value in chosen.details.get(each.name, {}).items() if details.get(key) is None}
        )
        for each in precisions
    )
    rounded = [each.name for each in precisions if each.is_rounded]
    if source == "decoder" or not rounded:
        return Choice(chosen, source, precisions)
    asked = f"{options} would change nothing of that" if (options := as_options(details)) else ""
    if precision is not None:
        asked = f"--precision names {', '.join(rounded)}"
    if asked:
        why = f"--target {chosen.name} needs" if chosen.graph_source == source else f"{model_type} gets"
        raise EdgepruneError(
            f"{why} the {source} graph, which is written in {FLOAT32.name} alone, and {asked}; leave it out, or take "
            "another --target"
        )
    note = (
        f"{', '.join(rounded)} of the target {chosen.name} is made by the decoder graph alone, and this is the "
        f"{source} graph of {model_type}: the variant is {FLOAT32.name}"
    )
    return Choice(chosen, source, (FLOAT32,), (note,))


def _names(target: Target | None, precision: str | None) -> str:
    """Names of the variants: the user's, else the target's, else float32."""
    if precision is not None:
        return precision
    return ",".join(target.precisions) if target else FLOAT32.name


def _source(target: Target | None, model_type: str, wanted: str) -> GraphSource:
    if target is None or target.graph_source == "auto":
        return graph_source_of(model_type, wanted)
    if wanted not in ("auto", target.graph_source):
        graph_source_of(model_type, wanted)  # an unknown one is that in the first place
        raise EdgepruneError(
            f"--target {target.name} needs the {target.graph_source} graph, and --graph-source asks for {wanted}; "
            "leave one of them out"
        )
    if target.graph_source == "decoder" and architecture(model_type).SOURCE != "decoder":
        raise EdgepruneError(
            f"--target {target.name} needs the decoder graph, which does not know {model_type!r}; take another --target"
        )
    return graph_source_of(model_type, target.graph_source)
