"""Stages of a long command: bars with an estimate on a terminal, one line each elsewhere, and how long each took."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Step = Callable[[str, float], None]
"""Told the phase of a stage ("" where it has but one) and the share of that phase that is done, 0 to 1."""

_TITLE_WIDTH = 46


class Clock:
    """Hands progress on, and remembers when each phase of it ended."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress
        self._ended = {"": time.perf_counter()}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Take note of a step of a phase."""
        self._ended[phase] = time.perf_counter()
        self._progress(phase, done, total)

    def seconds(self, phase: str) -> float:
        """How long a phase took, from the end of the one before it."""
        phases = list(self._ended)
        return self._ended[phase] - self._ended[phases[phases.index(phase) - 1]]


class Stages:
    """Shows the stages of one command on stderr; `seconds` keeps how long each took."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        _quieten_libraries()

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        """Show one stage while the block inside runs; hands out a function that moves its bar."""
        began = time.perf_counter()
        current = ""
        with self._bars:
            task = self._bars.add_task(title, total=None)

            def step(phase: str, share: float) -> None:
                nonlocal current
                if phase != current:
                    # every phase is a bar of its own: the pace of one says nothing of the next
                    current = phase
                    self._bars.reset(task, description=f"{title}: {phase}")
                self._bars.update(task, total=1.0, completed=min(share, 1.0))

            try:
                yield step
            finally:
                self._bars.remove_task(task)
        self.seconds[title] = time.perf_counter() - began
        self.console.print(f"[green]✓[/] {title:{_TITLE_WIDTH}} [dim]{self.seconds[title]:7.1f} s[/]", highlight=False)

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """As `stage`, for work that counts (done, in all)."""
        with self.stage(title) as step:
            yield lambda done, total: step("", done / total if total else 1.0)

    @contextmanager
    def phased(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        """As `stage`, for work that counts (phase, done, in all)."""
        with self.stage(title) as step:
            yield lambda phase, done, total: step(phase, done / total if total else 1.0)

    def remark(self, text: str) -> None:
        """Say something about the stage before it."""
        self.console.print(f"  {escape(text)}", style="dim", highlight=False, soft_wrap=True)


def _quieten_libraries() -> None:
    """No bars of other libraries across ours; their warnings only where the user asked for the log (`--verbose`)."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not logging.getLogger().isEnabledFor(logging.INFO):
        transformers_logging.set_verbosity_error()
