"""Reading JSON and paths that a stranger wrote: every value is checked for type and size before it is used."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias, TypeGuard

from edgeprune_runtime.errors import EdgepruneError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MAX_COUNT = 2**53
"""The largest whole number every JSON reader holds exactly."""
MAX_TEXT = 1 << 16
MAX_ITEMS = 1 << 16
MAX_NUMBER = sys.float_info.max
MAX_REASON = 300


@contextmanager
def blaming(what: str, advice: str) -> Iterator[None]:
    """Inside, whatever a library makes of a stranger's data, an EdgepruneError says it: what, the reason, the advice.

    For libraries that promise no errors of their own: `tokenizers` raises bare Exception, and where its Rust code
    panics, a BaseException.
    """
    try:
        yield
    except (EdgepruneError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise EdgepruneError(f"{what} ({reason}); {advice}") from error


def read_json(path: Path, *, limit_bytes: int) -> Mapping[str, Json]:
    """The JSON object in a file of at most `limit_bytes`.

    Raises:
        EdgepruneError: if the file is missing, too large, not UTF-8 or not one JSON object.
    """
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise EdgepruneError(
                f"{path} has {size} bytes, at most {limit_bytes} were expected; it is not what it claims to be"
            )
        document = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise EdgepruneError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise EdgepruneError(f"{path} is not valid JSON ({error}); copy or make the file again") from error
    if not isinstance(document, dict):
        raise EdgepruneError(f"{path} holds a {type(document).__name__}, a JSON object was expected")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def relative_path(text: str, where: str) -> str:
    """`text` itself, once it is certain that it names something below the folder it is joined to, on every system.

    Raises:
        EdgepruneError: if the path is absolute, climbs with `..`, or holds a drive, a backslash or a control character.
    """
    parts = text.split("/")
    is_plain = all(part not in ("", ".", "..") and part.isprintable() for part in parts)
    if not is_plain or any(sign in text for sign in "\\:") or PurePosixPath(text).is_absolute():
        raise EdgepruneError(f"{where} is {text!r}; a relative path inside the folder, with '/', was expected")
    return text


def file_inside(folder: Path, relative: str, where: str) -> Path:
    """The regular file `relative` of `folder`, its symbolic links followed and still inside.

    Raises:
        EdgepruneError: if it is missing, is no regular file, or a link leads out of the folder.
    """
    path = folder / relative_path(relative, where)
    try:
        target = path.resolve()  # of a link in a circle the link itself, and before Python 3.13 an error
        is_inside = target.is_relative_to(folder.resolve()) and not target.is_symlink()
    except (OSError, RuntimeError):
        is_inside = False
    if not is_inside:
        raise EdgepruneError(
            f"{where} is {relative!r}, which leads out of {folder} through a link; copy the file itself"
        )
    if not path.is_file():
        raise EdgepruneError(f"{folder} has no file {relative!r}, which {where} names; copy the folder again, whole")
    return path


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object, read with the type and range each must have; errors say where it stands."""

    values: Mapping[str, Json]
    where: str

    def text(self, key: str, *, one_of: Sequence[str] = ()) -> str:
        """A string, one of the given where any are given."""
        value = self._value(key)
        if not _is_text(value) or (one_of and value not in one_of):
            raise self._wrong(key, value, f"one of {', '.join(one_of)}" if one_of else "a string")
        return value

    def path(self, key: str) -> str:
        """A relative path that stays inside its folder."""
        return relative_path(self.text(key), f"{self.where}.{key}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        found = []
        for value in self.items(key):
            if not _is_text(value):
                raise self._wrong(key, value, "a list of strings")
            found.append(value)
        return tuple(found)

    def paths(self, key: str) -> tuple[str, ...]:
        """A list of relative paths that stay inside their folder."""
        found = []
        for value in self.items(key):
            if not isinstance(value, str):
                raise self._wrong(key, value, "a list of relative paths")
            found.append(relative_path(value, f"{self.where}.{key}"))
        return tuple(found)

    def count(self, key: str, *, low: int = 0, high: int = MAX_COUNT) -> int:
        """A whole number in low..high."""
        return self._count(key, self._value(key), low, high)

    def optional_count(self, key: str, *, high: int = MAX_COUNT) -> int | None:
        """A whole number in 0..high, or None where the field is null or absent."""
        value = self.values.get(key)
        return None if value is None else self._count(key, value, 0, high)

    def counts(self, key: str, *, high: int = MAX_COUNT) -> tuple[int, ...]:
        """A list of whole numbers in 0..high."""
        return tuple(self._count(key, value, 0, high) for value in self.items(key))

    def number(self, key: str, *, low: float = -MAX_NUMBER) -> float:
        """A finite number not below `low`."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= MAX_NUMBER:
            raise self._wrong(key, value, f"a number of at least {low:g}")
        return float(value)

    def items(self, key: str) -> Sequence[Json]:
        """A list."""
        value = self._value(key)
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise self._wrong(key, value, "a list")
        return value

    def mapping(self, key: str) -> Mapping[str, Json]:
        """An object as it stands."""
        return self.fields(key).values

    def fields(self, key: str) -> "Fields":
        """An object, to be read field by field."""
        return self.nested(f"{self.where}.{key}", self._value(key))

    @staticmethod
    def nested(where: str, value: Json) -> "Fields":
        """`value` as fields, if it is an object."""
        if not isinstance(value, Mapping) or len(value) > MAX_ITEMS:
            raise EdgepruneError(f"{where} is {_short(value)}; an object was expected")
        return Fields(value, where)

    def _value(self, key: str) -> Json:
        if key not in self.values:
            raise EdgepruneError(f"{self.where} has no {key!r}; the file is not complete or of another version")
        return self.values[key]

    def _count(self, key: str, value: Json, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number in {low}..{high}")
        return value

    def _wrong(self, key: str, value: Json, expected: str) -> EdgepruneError:
        return EdgepruneError(f"{self.where}.{key} is {_short(value)}; {expected} was expected")


def _is_text(value: Json) -> TypeGuard[str]:
    """Whether a value is a string of bearable length that can be printed: JSON may name half of a surrogate pair."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _short(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
