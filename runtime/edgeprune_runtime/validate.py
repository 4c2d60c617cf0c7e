"""Checks on the device, without torch, that a bundle computes what the torch model computed.

A wrong deployment seldom crashes; it answers with plausible nonsense. So every way the graph is used is checked against
the golden logits: prefill, cached decoding from several split points, greedy continuation, batches of unequal lengths.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from edgeprune_runtime.bundle import MANIFEST_FILE, Bundle, check_file
from edgeprune_runtime.errors import EdgepruneError, GateError
from edgeprune_runtime.golden import GoldenCase, load_golden
from edgeprune_runtime.machine import this_machine
from edgeprune_runtime.packed import PackedCopy, usable_packed
from edgeprune_runtime.report import Report, Table, Verdict
from edgeprune_runtime.session import Decoder, Ids, Logits, Side

# Rows of the batch check are cut to these lengths: unequal on purpose, one a single token, small enough for a device.
_BATCH_LENGTHS = (96, 61, 17, 1)
_BATCH_STEPS = 3


@dataclass(frozen=True)
class Check:
    """One line of a validation."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Validation:
    """The checks of one variant on one provider; `is_packed` says that its packed copy was run."""

    bundle: str
    variant: str
    provider: str
    tolerance: float
    checks: tuple[Check, ...]
    is_packed: bool = False

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        """The validation as plain values."""
        return {**asdict(self), "passed": self.passed}

    def ensure_passed(self) -> None:
        """Do nothing if every check passed.

        Raises:
            GateError: naming the checks that failed.
        """
        failed = [f"{check.name} ({check.detail})" for check in self.checks if not check.passed]
        if failed:
            raise GateError(f"{self.bundle} is not valid: {'; '.join(failed)}")


def validate(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> Validation:
    """The result of every check; `on_check` hears each as it is made.

    Raises:
        EdgepruneError: if the bundle cannot be opened or run at all.
    """
    checks = []
    packed = usable_packed(bundle, provider)
    for check in _checks(bundle, packed, provider, threads):
        checks.append(check)
        if on_check:
            on_check(check)
    return Validation(
        str(bundle.path), bundle.variant_name, provider, bundle.variant.tolerance, tuple(checks), packed is not None
    )


def report_validation(result: Validation) -> Report:
    """A validation as a report: one row per check."""
    rows = tuple((check.name, "ok" if check.passed else "FAILED", check.detail) for check in result.checks)
    table = Table(
        f"{result.bundle}, variant {result.variant}{' (packed copy)' if result.is_packed else ''}, "
        f"provider {result.provider}",
        ("check", "result", "detail"),
        rows,
    )
    verdict = Verdict(
        "the bundle computes what its model computed" if result.passed else "the bundle is wrong", result.passed
    )
    return Report("edgeprune validate", this_machine(), (table,), (verdict,), {"validate": result.to_dict()})


def _checks(bundle: Bundle, packed: PackedCopy | None, provider: str, threads: int | None) -> Iterator[Check]:
    files = _check_files(bundle, packed)
    yield files
    if not files.passed:  # a graph that is not the one that was written is not even loaded
        return
    cases = load_golden(bundle)
    graph = packed.graph if packed else bundle.graph_path
    longest = max(len(case.ids) for case in cases)
    rows = len(_BATCH_LENGTHS)
    decoder = Decoder(bundle, provider=provider, threads=threads, graph=graph, rows=rows, tokens=longest)
    yield from _check_prefill(decoder, cases)
    yield _check_cached(decoder, cases)
    yield _check_greedy(decoder, cases)
    sides: tuple[Side, ...] = ("right",) if bundle.manifest.padding == "right" else ("left", "right")
    for side in sides:
        yield _check_batch(decoder, cases, side)


def _check_files(bundle: Bundle, packed: PackedCopy | None) -> Check:
    wrong = []
    for name in bundle.manifest.files:
        try:
            check_file(bundle, name, verify=True)
        except EdgepruneError as error:
            wrong.append(str(error))
    detail = f"{len(bundle.manifest.files)} files have the SHA-256 that {MANIFEST_FILE} states"
    if packed is not None:
        try:
            packed.check_bytes()
        except EdgepruneError as error:
            wrong.append(str(error))
        detail += f", {len(packed.files)} of the packed copy that of its record"
    return Check("files", not wrong, "; ".join(wrong) or detail)


def _check_prefill(decoder: Decoder, cases: list[GoldenCase]) -> Iterator[Check]:
    tolerance = decoder.bundle.variant.tolerance
    errors, agreeing, ties, positions = [], 0, 0, 0
    for case in cases:
        logits, _ = decoder.forward(case.ids[None])
        found = logits[0, case.positions]
        errors.append(_max_error(found, case.logits))
        for ours, reference in zip(found, case.logits, strict=True):
            positions += 1
            agreeing += bool(ours.argmax() == reference.argmax())
            ties += bool(ours.argmax() != reference.argmax()) and _is_near_tie(reference, int(ours.argmax()), tolerance)
    yield _error_check("prefill logits", errors, tolerance, f"{positions} positions of {len(cases)} sequences")
    detail = f"{agreeing} of {positions} positions" + (f", {ties} more near-ties" if ties else "")
    yield Check("argmax agreement", agreeing + ties == positions, detail)


def _check_cached(decoder: Decoder, cases: list[GoldenCase]) -> Check:
    """Each step with a cache of its own, as other runtimes have it, and where it can be in place, as `run` has it."""
    splits = [
        (case, split)
        for case in cases
        for split in sorted({1, len(case.ids) // 3, len(case.ids) // 2, len(case.ids) - 1} - {0, len(case.ids)})
        if split <= case.positions.max()
    ]
    if not splits:
        return Check("cached decoding", False, "no golden logits lie behind a first token; make the bundle again")
    ways = (False, True) if decoder.writes_in_place else (False,)
    errors = [
        _max_error(*_cached_logits(decoder, case, split, in_place=in_place))
        for case, split in splits
        for in_place in ways
    ]
    return _error_check("cached decoding", errors, decoder.bundle.variant.tolerance, f"{len(splits)} split points")


def _cached_logits(decoder: Decoder, case: GoldenCase, split: int, *, in_place: bool) -> tuple[Logits, Logits]:
    """Our logits at the golden positions behind `split`, and the reference's: some single tokens, then the rest."""
    _, cache = decoder.prefill([case.ids[:split]], room_tokens=len(case.ids) - split if in_place else 0)
    pieces = []
    singles = min(len(case.ids), split + 4)
    for start in range(split, singles):
        logits, cache = decoder.forward(case.ids[None, start : start + 1], cache=cache)
        pieces.append(logits[0])
    if singles < len(case.ids):
        logits, _ = decoder.forward(case.ids[None, singles:], cache=cache)
        pieces.append(logits[0])
    is_behind = case.positions >= split
    return np.concatenate(pieces)[case.positions[is_behind] - split], case.logits[is_behind]


def _check_greedy(decoder: Decoder, cases: list[GoldenCase]) -> Check:
    tolerance = decoder.bundle.variant.tolerance
    same = ties = total = 0
    for case in cases:
        for ours, token in zip(_continuation(decoder, case.ids, case.greedy), case.greedy, strict=True):
            total += 1
            same += int(ours.argmax()) == int(token)
            # The golden file has no logits here, but if ours are within the tolerance of the reference's, its choice is
            # at most twice the tolerance below our top.
            ties += int(ours.argmax()) != int(token) and _is_near_tie(ours, int(token), tolerance)
    detail = f"{same} of {total} tokens" + (f", {ties} more near-ties" if ties else "")
    return Check("greedy tokens", total > 0 and same + ties == total, detail)


def _continuation(decoder: Decoder, ids: Ids, following: Ids) -> Iterator[Logits]:
    """Logits (V,) that predict each of the following tokens, which are then fed whatever the logits said.

    The cache is continued in place where that is possible, as it is when text is generated.
    """
    logits, cache = decoder.prefill([ids], room_tokens=len(following))
    for token in following:
        yield logits[0]
        if cache.tokens < decoder.manifest.context_tokens:
            logits, cache = decoder.step([token], cache)


def _check_batch(decoder: Decoder, cases: list[GoldenCase], side: Side) -> Check:
    """Rows of unequal lengths in one batch, prefill and a few cached steps, against golden logits and rows alone."""
    rows, references = [], []
    for index, length in enumerate(_BATCH_LENGTHS):
        case = cases[index % len(cases)]
        row = case.ids[:length]
        rows.append(row)
        is_inside = case.positions < len(row)
        references.append((case.positions[is_inside], case.logits[is_inside]))
    ids, mask = decoder.pad(rows, side)
    logits, _ = decoder.forward(ids, mask)
    errors = []
    for index, (positions, reference) in enumerate(references):
        found = logits[index][mask[index]][positions]
        errors.append(_max_error(found, reference))

    longest = max(map(len, rows))
    steps = min(_BATCH_STEPS, decoder.manifest.context_tokens - longest)
    following = np.stack([np.roll(row, -1 - index)[np.arange(steps) % len(row)] for index, row in enumerate(rows)])
    batch, cache = decoder.prefill(rows, side=side)
    alone = [decoder.prefill([row]) for row in rows]
    errors += [_max_error(batch[index], logits[0]) for index, (logits, _) in enumerate(alone)]
    for step in range(steps):
        batch, cache = decoder.step(following[:, step], cache)
        alone = [decoder.step(following[index, step : step + 1], past) for index, (_, past) in enumerate(alone)]
        errors += [_max_error(batch[index], logits[0]) for index, (logits, _) in enumerate(alone)]
    what = f"{len(rows)} rows of unequal lengths, {steps} cached steps"
    return _error_check(f"batch padded {side}", errors, decoder.bundle.variant.tolerance, what)


def _error_check(name: str, errors: list[float], tolerance: float, what: str) -> Check:
    worst = max(errors)
    return Check(name, worst <= tolerance, f"largest error {worst:.2e} of {tolerance:.0e} allowed, {what}")


def _max_error(ours: Logits, reference: Logits) -> float:
    if not reference.size:
        return 0.0
    error = float(np.abs(ours - reference).max())
    return error if np.isfinite(error) else float("inf")


def _is_near_tie(logits: Logits, token: int, tolerance: float) -> bool:
    """Whether `token` stands so close below the top that errors within the tolerance could have swapped them."""
    return bool(logits.max() - logits[token] <= 2 * tolerance)
