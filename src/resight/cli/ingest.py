"""`resight ingest` and `resight collect`: crops of a site.

`ingest` adds crops from footage or from a server's collection to a crop store; `collect` selects the crops of one
adaptation from a site's growing store.
"""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli.options import DEFAULT_SERVER, DeviceOption, JsonOption, ServerOption, connect, write_json
from resight.errors import (
    CollectionNotFoundError,
    CropsMissingError,
    DetectorError,
    FootageError,
    InputError,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from resight.client.responses import KeptCrops
    from resight.training.ingest.boxes import Detector
    from resight.training.ingest.footage import Footage
    from resight.training.ingest.gallery import EntryCrops
    from resight.training.ingest.pipeline import IngestJournal, SourceResult
    from resight.training.ingest.sampling import SamplingSettings
    from resight.training.ingest.tracks import TrackMode
    from resight.training.store.growing import GrowingStore


DAY_S = 86_400.0


def collect(
    source: Annotated[Path | None, typer.Option("--from", help="The site's growing crop store.")] = None,
    into: Annotated[Path | None, typer.Option(help="Crop store of the run, to create.")] = None,
    since: Annotated[float, typer.Option(help="Unix time in seconds; later crops are new.")] = 0.0,
    reference: Annotated[
        Path | None, typer.Option(help="The judge's reference store; its tracks are never selected.")
    ] = None,
    min_crops: Annotated[int, typer.Option(min=1, help="With fewer new crops, the outcome is `skipped`.")] = 500,
    max_crops: Annotated[int, typer.Option(min=2, help="Maximum number of crops, including older ones.")] = 20_000,
    replay: Annotated[float, typer.Option(min=0, max=0.9, help="Share of older crops among all.")] = 0.3,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of each camera's new crops held out to judge on.")
    ] = 0.2,
    retention: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Crops older than this are never selected.")
    ] = None,
    purge: Annotated[bool, typer.Option("--purge", help="Delete such crops from both stores.")] = False,
    freeze: Annotated[
        Path | None,
        typer.Option(metavar="SITE", help="Instead: add the crops held out in this run's store to --reference."),
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Maximum number of crops in the reference.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random choices.")] = 0,
    now: Annotated[float | None, typer.Option(help="Current Unix time in seconds. [default: the clock]")] = None,
    json_file: JsonOption = None,
) -> None:
    """Select the crops of one adaptation: sound new crops, balanced over cameras, some older ones, and a held-out set.

    Example: `resight collect --from state/crops --into run/site --since 1772488800 --retention 30 --purge`

    Example: `resight collect --freeze run/site --reference state/reference --most 4000`
    """
    now_s = time.time() if now is None else now
    if purge and retention is None:
        raise InputError("--purge needs --retention DAYS")
    before_s = -math.inf if retention is None else now_s - retention * DAY_S
    purged = _purge(before_s, source, reference) if purge else 0
    if freeze is not None:
        if reference is None or source is not None or into is not None:
            raise InputError("--freeze SITE needs --reference STORE, and neither --from nor --into")
        from resight.training.curation.reference import add_to_reference

        frozen = add_to_reference(freeze, reference, most=most, before_s=before_s)
        write_json(json_file, {"outcome": "frozen", **frozen, "purged": purged})
        return
    if source is None or into is None:
        raise InputError("expected --from STORE and --into SITE, or --freeze SITE and --reference STORE")
    from resight.training.curation.collect import CollectSettings
    from resight.training.curation.collect import collect as collect_crops

    settings = CollectSettings(since, min_crops, max_crops, replay, hold_out, retention, seed)
    found = collect_crops(source, into, settings, reference=reference, now_s=now_s).to_json()
    _print_collected(found, into)
    write_json(json_file, {**found, "site": str(into), "purged": purged})


def _purge(before_s: float, source: Path | None, reference: Path | None) -> int:
    """Delete expired crops from both stores; the reference also loses crops that the source no longer has."""
    from resight.training.store.growing import purge

    removed = 0 if source is None else purge(source, before_s)
    return removed + (0 if reference is None else purge(reference, before_s, source=source))


def _print_collected(found: dict[str, Any], into: Path) -> None:
    """Print the counts per camera, the outcome, and its reasons."""
    console = Console()
    if found["cameras"]:
        kinds = ("train", "replayed", "held_out")
        table = Table("camera", "training", "of these replayed", "held out", title=escape(str(into)))
        for name, counts in found["cameras"].items():
            table.add_row(escape(name), *(str(counts[kind]) for kind in kinds))
        console.print(table)
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found["crops"].items())
    console.print(f"{found['outcome']}: {counts}", markup=False, highlight=False, soft_wrap=True)
    for reason in found["reasons"]:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)


DetectorOfSource: TypeAlias = "Callable[[int], Detector]"
"""Returns the detector for the source with an index."""


@dataclass(frozen=True)
class IngestOptions:
    """Options of a call that apply to all sources; named like the command's options."""

    camera: str
    fps: float
    start_s: float | None
    duration_s: float | None
    hwaccel: str
    sampling: SamplingSettings
    tracks: TrackMode
    again: bool


def check_ingest_options(
    sources: Sequence[str],
    start: str | None,
    duration: float | None,
    detections: Sequence[Path] | None,
    tracks: str,
    weights: Path | None,
) -> None:
    """Reject incompatible options, before anything is opened."""
    if start is not None and len(sources) > 1:
        raise InputError(
            f"one --start for {len(sources)} sources: ingest each source in a separate call", field="start"
        )
    live = [source for source in sources if "://" in source]
    if live and len(sources) > 1:
        raise InputError("a live stream does not end: ingest it in a separate call", field="sources")
    if duration is not None and not live:
        raise InputError("--duration is for live streams: omit it", field="duration")
    if detections and (live or len(detections) != len(sources)):
        raise InputError(
            f"{len(detections)} files of --detections for {len(sources)} sources: expected one for each source",
            field="detections",
        )
    if tracks not in ("own", "given") or (tracks == "given" and not detections):
        raise InputError(
            f"--tracks {tracks}: expected own, or given with --detections that carry tracks", field="tracks"
        )
    if detections and weights is not None:
        raise InputError("--detections need no detector: omit --detector-weights", field="detector_weights")


def shared_detector(name: str, weights: Path | None, device: str) -> DetectorOfSource:
    """One detector for all sources, loaded when the first source has been opened; its errors end the call."""

    @cache
    def detector() -> Detector:
        from resight.training.features.extract import require_device
        from resight.training.ingest.detector import open_detector

        require_device(device)
        try:
            return open_detector(name, weights=weights, device=device)
        except DetectorError as error:
            raise InputError(str(error), field=error.field) from error  # an error of the call, not of this source

    return lambda number: detector()


def boxes_from_files(detections: Sequence[Path], call: IngestOptions) -> DetectorOfSource:
    """Detectors that read a file of boxes for each source."""
    from resight.training.ingest.boxes import BoxFile

    def find(number: int) -> Detector:
        boxes = BoxFile(detections[number], call.fps)
        if call.tracks == "given" and not boxes.has_tracks:
            raise InputError(f"--tracks given: {detections[number]} has no tracks", field="tracks")
        return boxes

    return find


def ingest_sources(
    store: GrowingStore, sources: Sequence[str], call: IngestOptions, finder: DetectorOfSource, console: Console
) -> tuple[list[SourceResult], dict[str, str]]:
    """Ingest the sources in order, with a progress bar for each.

    Returns:
        The results of the sources that could be read, and the errors of the others by source.

    Raises:
        InputError: no source could be read; it is the first error.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from resight.training.ingest.pipeline import IngestJournal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: list[SourceResult] = []
    failed: dict[str, InputError] = {}
    with IngestJournal(store.root) as journal, Progress(*columns, console=console) as bar:
        for number, source in enumerate(sources):
            try:
                outcome = _ingest_source(store, journal, source, call, partial(finder, number), bar)
            except (FootageError, DetectorError) as error:
                failed[source] = error
                if len(sources) > 1:
                    console.print(f"skipped: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            outcomes.append(outcome)
            if outcome.status == "skipped":
                message = f"{outcome.name} was already ingested: skipped"
                console.print(message, markup=False, highlight=False, soft_wrap=True)
    if failed and not outcomes:
        raise next(iter(failed.values()))
    return outcomes, {source: str(error) for source, error in failed.items()}


def _ingest_source(
    store: GrowingStore,
    journal: IngestJournal,
    source: str,
    call: IngestOptions,
    finder: Callable[[], Detector],
    bar: Progress,
) -> SourceResult:
    """Open and ingest one source."""
    from resight.training.ingest.pipeline import ingest
    from resight.training.ingest.sources import open_footage

    footage = open_footage(
        source,
        camera=call.camera,
        fps=call.fps,
        start_s=call.start_s,
        duration_s=call.duration_s,
        hwaccel=call.hwaccel,
    )
    task = bar.add_task(escape(Path(footage.name).name), total=footage.total)
    with _stop_on_signal(footage):
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
def _stop_on_signal(source: Footage) -> Iterator[None]:
    """End a live stream cleanly on Ctrl-C and SIGTERM; for a file, the same command continues later."""
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


def print_outcomes(outcomes: Sequence[SourceResult], failed: Mapping[str, str], console: Console) -> dict[str, Any]:
    """Print the counts of all sources; returns them as plain values."""
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
    console.print(f"boxes without a crop: {reasons or 'none'}", markup=False, highlight=False, soft_wrap=True)
    rows += [{"source": source, "status": "failed", "error": error} for source, error in failed.items()]
    fresh = [row for row in rows if row["status"] == "done"]
    total = {name: sum(row[name] for row in fresh) for name in (*names, "left_out", "tracks_without_crops")}
    return {
        "sources": rows,
        "total": {**total, "skipped": len(outcomes) - len(fresh), "failed": len(failed), "dropped": dict(dropped)},
    }


SOURCES_HELP = "Video files, folders of images, rtsp:// URLs; all of one camera."
START_HELP = "Time of the first frame, ISO 8601 with zone, or Unix seconds. [default: from the file]"
DETECTOR_HELP = "fasterrcnn-mobilenet, fasterrcnn, retinanet, fcos, ssdlite (torchvision's), or an .onnx file."
DETECTIONS_HELP = "Boxes from another tool, MOT or JSON lines; one file for each source, in the same order."
HWACCEL_HELP = "Decoder: auto, none, or a device of FFmpeg, such as cuda or vaapi."


def ingest(
    into: Annotated[Path, typer.Option(help="Crop store to add to; created if missing.")],
    sources: Annotated[list[str] | None, typer.Argument(help=SOURCES_HELP, show_default=False)] = None,
    camera: Annotated[str, typer.Option(help="The camera's name at the site.")] = "",
    start: Annotated[str | None, typer.Option(help=START_HELP)] = None,
    duration: Annotated[float | None, typer.Option(min=1, help="Seconds to record of a live stream.")] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=60, help="Frames processed per second of footage.")] = 5.0,
    detector: Annotated[str, typer.Option(help=DETECTOR_HELP)] = "fasterrcnn-mobilenet",
    detector_weights: Annotated[
        Path | None, typer.Option(help="State dict for a torchvision detector, instead of a download.")
    ] = None,
    detections: Annotated[list[Path] | None, typer.Option(help=DETECTIONS_HELP)] = None,
    tracks: Annotated[str, typer.Option(help="own (ByteTrack), or given: from --detections.")] = "own",
    score: Annotated[float, typer.Option(min=0.1, max=1, help="Minimum score of a box that starts a track.")] = 0.5,
    crops_per_track: Annotated[int, typer.Option(min=1, max=1000, help="Maximum number of crops per track.")] = 8,
    min_height: Annotated[int, typer.Option(min=16, max=4096, help="Minimum height of a box, in pixels.")] = 64,
    device: DeviceOption = "cpu",
    hwaccel: Annotated[str, typer.Option(help=HWACCEL_HELP)] = "auto",
    again: Annotated[
        bool, typer.Option("--again", help="Ingest sources again; their earlier crops are deleted.")
    ] = False,
    from_gallery: Annotated[
        str | None, typer.Option(metavar="COLLECTION", help="Instead: import the crops kept by a server's collection.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    montage: Annotated[Path | None, typer.Option(help="Also write a montage of tracks (.html or .jpg).")] = None,
    json_file: JsonOption = None,
) -> None:
    """Detect and track people in footage, and add a few good crops of each track to a crop store.

    Example: `resight ingest door/*.mp4 --camera door --into crops/`

    Example: `resight ingest hall.mkv --camera hall --start 2026-03-01T22:00:00Z --detections hall.txt --into crops/`

    Example: `resight ingest rtsp://10.0.0.7/live --camera gate --duration 3600 --detector yolo.onnx --into crops/`

    Example: `resight ingest --from-gallery lobby --server 127.0.0.1:50051 --into crops/`

    After an interruption, the same command continues; completed sources are skipped. A source that cannot
    be read is reported and skipped; if none can be read, the exit status is 1.
    """
    from resight.training.ingest.footage import check_camera, parse_time
    from resight.training.ingest.sampling import SamplingSettings
    from resight.training.report.tracks import check_track_sheet
    from resight.training.store.growing import GrowingStore

    if montage is not None:
        check_track_sheet(montage)
    if (from_gallery is None) == (not sources):
        raise InputError("expected either sources or --from-gallery COLLECTION", field="sources")
    store, console = GrowingStore(into), Console(stderr=True)
    if from_gallery is not None:
        figures, folders = _ingest_gallery(store, from_gallery, server, console)
    else:
        check_ingest_options(sources or [], start, duration, detections, tracks, detector_weights)
        call = IngestOptions(
            camera=check_camera(camera),
            fps=fps,
            start_s=None if start is None else parse_time(start),
            duration_s=duration,
            hwaccel=hwaccel,
            sampling=SamplingSettings(crops_per_track=crops_per_track, min_height=min_height, start_score=score),
            tracks="given" if tracks == "given" else "own",
            again=again,
        )
        finder = (
            boxes_from_files(detections, call) if detections else shared_detector(detector, detector_weights, device)
        )
        outcomes, failed = ingest_sources(store, sources or [], call, finder, console)
        figures, folders = print_outcomes(outcomes, failed, console), [one.folder for one in outcomes]
    if montage is not None:
        _write_montage(montage, into, folders, console)
    write_json(json_file, {"store": str(into), **figures})


def _ingest_gallery(
    store: GrowingStore, collection: str, server: str, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Import the crops of a collection, and the feedback on pairs of entries."""
    from resight.training.ingest.gallery import collection_folder, forget_gallery, sync_gallery

    with connect(server) as client:
        try:
            feedback = [(one.entry_id, one.other_entry_id, one.same) for one in client.list_feedback(collection)]
            counts = sync_gallery(store, collection, map(_kept_entry, client.stream_crops(collection)), feedback)
        except (CollectionNotFoundError, CropsMissingError):
            removed = forget_gallery(store, collection)
            if removed:
                console.print(f"removed {removed} crops of {collection}, which no longer keeps crops", highlight=False)
            raise
    table = Table("", "count", title=escape(f"{collection} of {server}"))
    for name, count in counts.to_json().items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    return {"gallery": {"collection": collection, "folder": collection_folder(collection), **counts.to_json()}}, [
        collection_folder(collection)
    ]


def _kept_entry(found: KeptCrops) -> EntryCrops:
    """Convert the kept crops of an entry from the client's type to training's."""
    from resight.training.ingest.gallery import EntryCrops

    entry = found.entry
    time_s = None if entry.capture_time is None else entry.capture_time.timestamp()
    return EntryCrops(entry.entry_id, entry.camera_id, entry.track_id, time_s, found.images)


def _write_montage(path: Path, root: Path, folders: Sequence[str], console: Console) -> None:
    """Write a montage of the ingested tracks, or print that there are none."""
    import numpy as np

    from resight.training.report.tracks import write_track_sheet
    from resight.training.store.crops import is_store, open_store

    train = open_store(root).get("train") if is_store(root) else None
    prefixes = tuple(f"{folder}/" for folder in folders)
    rows = [] if train is None else [row for row, crop in enumerate(train.paths) if crop.startswith(prefixes)]
    if train is None or not rows:
        console.print(f"no crops, so {path} was not written", markup=False, highlight=False)
        return
    shown = write_track_sheet(path, train.subset(np.array(rows)), title=f"Tracks in {root}")
    console.print(f"wrote {path} with {shown} tracks", markup=False, highlight=False, soft_wrap=True)
