"""Progress display of one or several runs: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LEFT = "out of time; it goes on from its checkpoint"
"""What is shown of a run that is left unfinished."""


def format_duration(seconds: float) -> str:
    """Render a duration in seconds.

    >>> format_duration(75), format_duration(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_roughly(seconds: float) -> str:
    """Render an estimate of a duration in seconds.

    >>> format_roughly(38), format_roughly(1310), format_roughly(3800)
    ('1 min', '22 min', '1 h 3 min')
    """
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{max(1, minutes)} min"


def format_point(point: dict[str, Any], steps: int) -> str:
    """Render a point of a training curve, with an estimate of the time left.

    >>> format_point({"step": 5, "loss": 1.0, "accuracy": 0.5, "tokens_per_second": 100.0, "seconds": 10.0}, 10)
    'loss 1.000  accuracy 50.0 %  100 tokens/s  0:10 left'
    """
    left = point["seconds"] / point["step"] * (steps - point["step"])
    return (
        f"loss {point['loss']:.3f}  accuracy {100 * point['accuracy']:.1f} %  "
        f"{point['tokens_per_second']:,.0f} tokens/s  {format_duration(left)} left"
    )


class PlainDisplay:
    """Prints a line when a run starts, when it ends, and at most every `EVERY` seconds in between."""

    EVERY = 20.0
    """Minimum seconds between two lines of a run."""

    def __init__(self) -> None:
        """Start without runs."""
        self.names: dict[str, tuple[str, int]] = {}
        self.shown: dict[str, float] = {}

    def __enter__(self) -> PlainDisplay:
        """Return the display."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: there is nothing to close."""

    def line(self, text: str) -> None:
        """Print a line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def start(self, run_id: str, name: str, steps: int) -> None:
        """Print that a run starts."""
        self.names[run_id] = (name, steps)
        self.shown[run_id] = time.monotonic()
        self.line(f"{run_id}  {name}: {steps} steps")

    def point(self, run_id: str, point: dict[str, Any]) -> None:
        """Print a point if the last printed point is old enough."""
        if run_id in self.names and time.monotonic() - self.shown[run_id] >= self.EVERY:
            name, steps = self.names[run_id]
            self.shown[run_id] = time.monotonic()
            self.line(f"{run_id}  {name}: step {point['step']}/{steps}  {format_point(point, steps)}")

    def wait(self, run_id: str, holder: str) -> None:
        """Print that a run waits for another process."""
        self.line(f"{run_id}  {self.names[run_id][0]}: waits for {holder}, which trains it or a stage of it")

    def end(self, run_id: str, error: str | None) -> None:
        """Print that a run has ended."""
        name, _ = self.names[run_id]
        self.line(f"{run_id}  {name}: {'done' if error is None else f'failed: {error}'}")

    def leave(self, run_id: str) -> None:
        """Print that a run is left unfinished."""
        self.line(f"{run_id}  {self.names[run_id][0]}: {LEFT}")


class BarDisplay:
    """A progress bar per run, with loss, accuracy, tokens per second and time left."""

    def __init__(self) -> None:
        """Create the columns of the bars."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}", markup=False),
        )
        self.tasks: dict[str, tuple[Any, int]] = {}

    def __enter__(self) -> BarDisplay:
        """Start drawing."""
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self.progress.stop()

    def start(self, run_id: str, name: str, steps: int) -> None:
        """Add a bar for a run."""
        task = self.progress.add_task(name, total=max(steps, 1), info="preparing")
        self.tasks[run_id] = (task, steps)

    def point(self, run_id: str, point: dict[str, Any]) -> None:
        """Update the bar of a run."""
        if run_id in self.tasks:
            task, steps = self.tasks[run_id]
            info = format_point(point, steps) if point["step"] < steps else "evaluating"
            self.progress.update(task, completed=point["step"], info=info)

    def wait(self, run_id: str, holder: str) -> None:
        """Show at the bar of a run that the run waits for another process."""
        self.progress.update(self.tasks[run_id][0], info=f"waits for {holder}")

    def end(self, run_id: str, error: str | None) -> None:
        """Complete the bar of a run, or show its error."""
        task, steps = self.tasks[run_id]
        if error is None:
            self.progress.update(task, completed=max(steps, 1), info="done")
        else:
            self.progress.update(task, info=f"failed: {error}")

    def leave(self, run_id: str) -> None:
        """Show at the bar of a run that it is left unfinished."""
        self.progress.update(self.tasks[run_id][0], info=LEFT)


def make_display() -> BarDisplay | PlainDisplay:
    """Return bars in a terminal, plain lines elsewhere."""
    return BarDisplay() if sys.stderr.isatty() and sys.stdout.isatty() else PlainDisplay()
