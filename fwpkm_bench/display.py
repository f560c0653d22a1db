"""What a running sweep shows: a progress bar on a terminal, one plain line a case elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from fwpkm_bench.run import Progress


class Display:
    """A context manager; hand its `show` to `run.run`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.plain = not sys.stderr.isatty()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=self.plain,
        )
        self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Called before a case (no outcome yet) and after it."""
        left = f"about {duration(progress.left_s)} left" if progress.left_s else "done"
        if progress.outcome is None:
            self._bar.update(
                self._task,
                description=f"{progress.case.label:<24}",
                completed=progress.done,
                total=progress.total,
                left=left,
            )
            return
        line = f"[{progress.done:>3}/{progress.total}] {progress.case.label:<24} {describe(progress.outcome)}"
        if self.plain:
            print(f"{line}  ({left})", file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=progress.done, left=left)
            self.console.print(escape(line), style=None if progress.outcome["status"] == "ok" else "yellow")


def describe(outcome: dict[str, Any]) -> str:
    """One line of what came out of a case."""
    columns = outcome["columns"]
    if outcome["status"] != "ok":
        return f"{outcome['status']}: {outcome['reason']}"
    if "tokens_per_s" in columns:
        times = "once" if columns["samples"] == 1 else f"{columns['samples']} times"
        return f"{columns['tokens_per_s']:>12,.0f} tokens/s, measured {times}"
    if "recall" in columns:
        return f"{columns['recall']:>12.3f} recalled"
    return "ok"


def duration(seconds: float) -> str:
    """``75`` as ``1m 15s``."""
    whole = round(seconds)
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"
