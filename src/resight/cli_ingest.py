"""`resight ingest`: footage, or what a gallery keeps, becomes crops to adapt to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli_connect import connect
from resight.cli_gallery import DEFAULT_SERVER, Server
from resight.cli_ingest_call import Call, check_options, given_boxes, one_detector
from resight.cli_ingest_footage import read_sources, tell_outcomes
from resight.cli_json import JsonOption, write_json
from resight.cli_train import DeviceOption
from resight.errors import CollectionNotFoundError, CropsMissingError, InputError

if TYPE_CHECKING:
    from resight.answers import KeptCrops
    from resight.training.gallery_crops import KeptEntry
    from resight.training.growing import GrowingStore

SOURCES_HELP = "Video files, folders of images, rtsp:// URLs; all of one camera."
START_HELP = "Moment of the first frame, ISO 8601 with its zone, or Unix seconds; otherwise what the file says."
DETECTOR_HELP = "fasterrcnn-mobilenet, fasterrcnn, retinanet, fcos, ssdlite (torchvision's), or an .onnx file."
DETECTIONS_HELP = "Boxes found elsewhere, MOT or JSON lines; one file for each source, in their order."
HWACCEL_HELP = "Decoder: auto, none, or a device FFmpeg knows, such as cuda or vaapi."


def ingest(
    into: Annotated[Path, typer.Option(help="Crop store to add to; made where there is none.")],
    sources: Annotated[list[str] | None, typer.Argument(help=SOURCES_HELP, show_default=False)] = None,
    camera: Annotated[str, typer.Option(help="The camera's name at the site.")] = "",
    start: Annotated[str | None, typer.Option(help=START_HELP)] = None,
    duration: Annotated[float | None, typer.Option(min=1, help="Seconds to watch a live stream.")] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=60, help="Frames a second to look at.")] = 5.0,
    detector: Annotated[str, typer.Option(help=DETECTOR_HELP)] = "fasterrcnn-mobilenet",
    detector_weights: Annotated[
        Path | None, typer.Option(help="State dict for a detector of torchvision, instead of its download.")
    ] = None,
    detections: Annotated[list[Path] | None, typer.Option(help=DETECTIONS_HELP)] = None,
    tracks: Annotated[str, typer.Option(help="own (ByteTrack), or given: those of --detections.")] = "own",
    score: Annotated[float, typer.Option(min=0.1, max=1, help="Least score of a box that begins a track.")] = 0.5,
    crops_per_track: Annotated[int, typer.Option(min=1, max=1000, help="Crops of a track at most.")] = 8,
    min_height: Annotated[int, typer.Option(min=16, max=4096, help="Rows of a box at least.")] = 64,
    device: DeviceOption = "cpu",
    hwaccel: Annotated[str, typer.Option(help=HWACCEL_HELP)] = "auto",
    again: Annotated[bool, typer.Option("--again", help="Read sources anew; their earlier crops go.")] = False,
    from_gallery: Annotated[
        str | None, typer.Option(metavar="COLLECTION", help="Instead: the crops that a server's collection keeps.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    montage: Annotated[Path | None, typer.Option(help="Also show tracks here (.html or .jpg).")] = None,
    json_file: JsonOption = None,
) -> None:
    """Cut crops of people from footage into a crop store: boxes, tracks, a few good crops of each.

    Example: `resight ingest door/*.mp4 --camera door --into crops/`

    Example: `resight ingest hall.mkv --camera hall --start 2026-03-01T22:00:00Z --detections hall.txt --into crops/`

    Example: `resight ingest rtsp://10.0.0.7/live --camera gate --duration 3600 --detector yolo.onnx --into crops/`

    Example: `resight ingest --from-gallery lobby --server 127.0.0.1:50051 --into crops/`

    Interrupted, the same command goes on where it was; a source that is done is skipped. Of several sources one that
    cannot be used is told and left out; with none left the command ends with status 1.
    """
    from resight.training.footage import check_camera, read_clock
    from resight.training.growing import GrowingStore
    from resight.training.sampling import Sampling
    from resight.training.track_sheet import check_sheet

    if montage is not None:
        check_sheet(montage)
    if (from_gallery is None) == (not sources):
        raise InputError("name sources, or --from-gallery COLLECTION: one of both", field="sources")
    store, console = GrowingStore(into), Console(stderr=True)
    if from_gallery is not None:
        told, folders = _gallery(store, from_gallery, server, console)
    else:
        check_options(sources or [], start, duration, detections, tracks, detector_weights)
        call = Call(
            camera=check_camera(camera),
            fps=fps,
            start_s=None if start is None else read_clock(start),
            duration_s=duration,
            hwaccel=hwaccel,
            sampling=Sampling(crops_per_track=crops_per_track, min_height=min_height, start_score=score),
            tracks="given" if tracks == "given" else "own",
            again=again,
        )
        finder = given_boxes(detections, call) if detections else one_detector(detector, detector_weights, device)
        outcomes, failed = read_sources(store, sources or [], call, finder, console)
        told, folders = tell_outcomes(outcomes, failed, console), [one.folder for one in outcomes]
    if montage is not None:
        _montage(montage, into, folders, console)
    write_json(json_file, {"store": str(into), **told})


def _gallery(store: GrowingStore, collection: str, server: str, console: Console) -> tuple[dict[str, Any], list[str]]:
    """The crops of a collection, and what was said of pairs of them."""
    from resight.training.gallery_crops import folder_of, forget_gallery, sync_gallery

    with connect(server) as client:
        try:
            feedback = [(one.entry_id, one.other_entry_id, one.same) for one in client.list_feedback(collection)]
            counts = sync_gallery(store, collection, map(_kept, client.stream_crops(collection)), feedback)
        except (CollectionNotFoundError, CropsMissingError):
            removed = forget_gallery(store, collection)
            if removed:
                console.print(f"removed the {removed} crops of {collection}, which keeps none", highlight=False)
            raise
    table = Table("", "count", title=escape(f"{collection} of {server}"))
    for name, count in counts.to_json().items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    return {"gallery": {"collection": collection, "folder": folder_of(collection), **counts.to_json()}}, [
        folder_of(collection)
    ]


def _kept(found: KeptCrops) -> KeptEntry:
    """An answer of the service in training's words."""
    from resight.training.gallery_crops import KeptEntry

    entry = found.entry
    time_s = None if entry.capture_time is None else entry.capture_time.timestamp()
    return KeptEntry(entry.entry_id, entry.camera_id, entry.track_id, time_s, found.images)


def _montage(path: Path, root: Path, folders: Sequence[str], console: Console) -> None:
    """Tracks of what was asked for, or that nothing is there."""
    import numpy as np

    from resight.training.crops import is_store, open_store
    from resight.training.track_sheet import write_sheet

    train = open_store(root).get("train") if is_store(root) else None
    prefixes = tuple(f"{folder}/" for folder in folders)
    rows = [] if train is None else [row for row, crop in enumerate(train.paths) if crop.startswith(prefixes)]
    if train is None or not rows:
        console.print(f"no crop, so no montage at {path}", markup=False, highlight=False)
        return
    shown = write_sheet(path, train.subset(np.array(rows)), title=f"Tracks in {root}")
    console.print(f"{shown} tracks are shown in {path}", markup=False, highlight=False, soft_wrap=True)
