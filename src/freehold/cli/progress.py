"""Progress of what takes longer than a second: on stderr, and only where somebody watches.

Not here: what makes the progress; it calls the function that a bar yields. rich is imported where a bar is drawn, so
that scripts do not wait for it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def bytes_bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that takes bytes done and bytes in all, and draws them with their rate."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(title, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


@contextmanager
def steps_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function that takes steps done, steps in all and the name of the next, and draws them."""
    if not sys.stderr.isatty():
        yield lambda done, total, step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(title, total=None)
        yield lambda done, total, step: drawn.update(task, completed=done, total=total, description=step)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show that something is under way whose length is not known."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield


def after_waiting(title: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, showing that something is under way until the first is there."""
    iterator = iter(items)
    with waiting(title):
        first = list(islice(iterator, 1))
    yield from first
    yield from iterator
