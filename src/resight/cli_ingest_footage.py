"""What `resight ingest` does with footage: open all of it, read one source after the other, tell what became of it."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.errors import InputError

if TYPE_CHECKING:
    from resight.training.detect import Detector
    from resight.training.footage import Footage
    from resight.training.growing import GrowingStore
    from resight.training.ingest import Counts, Outcome
    from resight.training.sampling import Sampling


def check_options(
    sources: Sequence[str],
    start: str | None,
    duration: float | None,
    detections: Sequence[Path] | None,
    tracks: str,
    weights: Path | None,
) -> None:
    """Refuse options that do not go together, before anything is opened."""
    if start is not None and len(sources) > 1:
        raise InputError(
            f"one --start for {len(sources)} sources: give each with its own in a call of its own", field="start"
        )
    live = [source for source in sources if "://" in source]
    if live and len(sources) > 1:
        raise InputError("a live stream does not end: give it in a call of its own", field="sources")
    if duration is not None and not live:
        raise InputError("--duration is for live streams: leave it away", field="duration")
    if detections and (live or len(detections) != len(sources)):
        raise InputError(
            f"{len(detections)} files of --detections for {len(sources)} sources: expected one for each recording",
            field="detections",
        )
    if tracks not in ("own", "given") or (tracks == "given" and not detections):
        raise InputError(
            f"--tracks {tracks}: expected own, or given with --detections that carry tracks", field="tracks"
        )
    if detections and weights is not None:
        raise InputError("--detections need no detector: leave --detector-weights away", field="detector_weights")


def open_sources(
    sources: Sequence[str], camera: str, fps: float, start: str | None, duration: float | None, hwaccel: str
) -> list[Footage]:
    """All sources, so that a wrong one is told before the first is read."""
    from resight.training.footage import open_footage, read_clock

    start_s = None if start is None else read_clock(start)
    return [
        open_footage(source, camera=camera, fps=fps, start_s=start_s, duration_s=duration, hwaccel=hwaccel)
        for source in sources
    ]


def finders(
    detections: Sequence[Path] | None, name: str, weights: Path | None, device: str, fps: float, tracks: str
) -> Callable[[int], Detector]:
    """Who finds people in the source of a number; a detector is made ready once, and not before it is needed."""

    @cache
    def detector() -> Detector:
        from resight.training.detect import open_detector
        from resight.training.run import require_device

        require_device(device)
        return open_detector(name, weights=weights, device=device)

    def given(number: int) -> Detector:
        from resight.training.given_boxes import GivenBoxes

        assert detections is not None
        boxes = GivenBoxes(detections[number], fps)
        if tracks == "given" and not boxes.has_tracks:
            raise InputError(f"--tracks given: {detections[number]} names no track", field="tracks")
        return boxes

    return given if detections else lambda number: detector()


def read_sources(
    store: GrowingStore,
    footage: Sequence[Footage],
    finder: Callable[[int], Detector],
    sampling: Sampling,
    tracks: str,
    again: bool,
    console: Console,
) -> list[Outcome]:
    """One source after the other, with a bar for each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from resight.training.ingest import ingest as ingest_source
    from resight.training.journal import Journal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes = []
    with Journal(store.root) as journal, Progress(*columns, console=console) as bar:
        for number, source in enumerate(footage):
            task = bar.add_task(escape(Path(source.name).name), total=source.total)

            def show(counts: Counts, task: Any = task) -> None:
                bar.update(task, completed=counts.frames)

            with _stopping(source):
                outcome = ingest_source(
                    source,
                    finder(number),
                    store,
                    journal,
                    sampling=sampling,
                    tracks="given" if tracks == "given" else "own",
                    again=again,
                    on_frame=show,
                )
            bar.update(task, total=max(1, outcome.counts.frames), completed=max(1, outcome.counts.frames))
            if outcome.status == "skipped":
                console.print(
                    f"{source.name} was ingested before: skipped", markup=False, highlight=False, soft_wrap=True
                )
            outcomes.append(outcome)
    return outcomes


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


def tell_outcomes(outcomes: Sequence[Outcome], console: Console) -> dict[str, Any]:
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
    fresh = [row for row in rows if row["status"] == "done"]
    total = {name: sum(row[name] for row in fresh) for name in (*names, "left_out", "tracks_without_crops")}
    return {"sources": rows, "total": {**total, "skipped": len(rows) - len(fresh), "dropped": dict(dropped)}}
