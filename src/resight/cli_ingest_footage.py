"""What `resight ingest` does with footage: open all of it, read one source after the other, tell what became of it."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli_ingest_call import Call, Finder
from resight.errors import DetectorError, FootageError, InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from resight.training.counts import Outcome
    from resight.training.detect import Detector
    from resight.training.footage import Footage
    from resight.training.growing import GrowingStore
    from resight.training.journal import Journal


def read_sources(
    store: GrowingStore, sources: Sequence[str], call: Call, finder: Finder, console: Console
) -> tuple[list[Outcome], dict[str, str]]:
    """One source after the other, with a bar for each.

    Returns:
        What became of those that could be read, and why others could not, by source.

    Raises:
        InputError: none could be read; it is the first one's reason.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from resight.training.journal import Journal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: list[Outcome] = []
    failed: dict[str, InputError] = {}
    with Journal(store.root) as journal, Progress(*columns, console=console) as bar:
        for number, source in enumerate(sources):
            try:
                outcome = _read_source(store, journal, source, call, partial(finder, number), bar)
            except (FootageError, DetectorError) as error:
                failed[source] = error
                if len(sources) > 1:
                    console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            outcomes.append(outcome)
            if outcome.status == "skipped":
                told = f"{outcome.name} was ingested before: skipped"
                console.print(told, markup=False, highlight=False, soft_wrap=True)
    if failed and not outcomes:
        raise next(iter(failed.values()))
    return outcomes, {source: str(error) for source, error in failed.items()}


def _read_source(
    store: GrowingStore, journal: Journal, source: str, call: Call, finder: Callable[[], Detector], bar: Progress
) -> Outcome:
    """Open and read one source."""
    from resight.training.footage import open_footage
    from resight.training.ingest import ingest

    footage = open_footage(
        source,
        camera=call.camera,
        fps=call.fps,
        start_s=call.start_s,
        duration_s=call.duration_s,
        hwaccel=call.hwaccel,
    )
    task = bar.add_task(escape(Path(footage.name).name), total=footage.total)
    with _stopping(footage):
        outcome = ingest(
            footage,
            finder(),
            store,
            journal,
            sampling=call.sampling,
            tracks=call.tracks,
            again=call.again,
            on_frame=lambda counts: bar.update(task, completed=counts.frames),
        )
    seen = max(1, outcome.counts.frames)
    bar.update(task, total=seen, completed=seen)
    return outcome


@contextmanager
def _stopping(source: Footage) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a live stream as its end would; a file is just read again from where it was."""
    stop = getattr(source, "stop", None)
    if stop is None:
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def tell_outcomes(outcomes: Sequence[Outcome], failed: Mapping[str, str], console: Console) -> dict[str, Any]:
    """Counts of every source, and of all, on the console and as plain values."""
    table = Table(title=f"{len(outcomes)} sources")
    names = ("frames", "unreadable", "boxes", "tracks", "crops")
    for column in ("source", "", *names):
        table.add_column(column, justify="left" if column in ("source", "") else "right")
    dropped: Counter[str] = Counter()
    rows = []
    for one in outcomes:
        counts = one.counts.to_json()
        table.add_row(escape(one.name), one.status, *(f"{counts[name]:,}" for name in names))
        if one.status == "done":
            dropped.update(one.counts.dropped)
        rows.append({"source": one.name, "camera": one.camera, "status": one.status, "folder": one.folder, **counts})
    console.print(table)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    console.print(f"boxes that became no crop: {reasons or 'none'}", markup=False, highlight=False, soft_wrap=True)
    rows += [{"source": source, "status": "failed", "error": error} for source, error in failed.items()]
    fresh = [row for row in rows if row["status"] == "done"]
    total = {name: sum(row[name] for row in fresh) for name in (*names, "left_out", "tracks_without_crops")}
    return {
        "sources": rows,
        "total": {**total, "skipped": len(outcomes) - len(fresh), "failed": len(failed), "dropped": dict(dropped)},
    }
