"""Stages of a long command: bars with an estimate on a terminal, one line each elsewhere, and how long each took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Step = Callable[[float], None]
"""Told the share of a stage that is done, 0 to 1."""


class Stages:
    """Shows the stages of one command on stderr; `seconds` keeps how long each took."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        """Show one stage while the block inside runs; hands out a function that moves its bar."""
        began = time.perf_counter()
        with self._bars:
            task: TaskID = self._bars.add_task(title, total=None)

            def step(share: float) -> None:
                self._bars.update(task, total=1.0, completed=min(share, 1.0))

            try:
                yield step
            finally:
                self._bars.remove_task(task)
        self.seconds[title] = time.perf_counter() - began
        self.console.print(f"[green]✓[/] {title} [dim]{self.seconds[title]:.1f} s[/]", highlight=False)

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """As `stage`, for work that counts (done, in all)."""
        with self.stage(title) as step:
            yield lambda done, total: step(done / total if total else 1.0)
