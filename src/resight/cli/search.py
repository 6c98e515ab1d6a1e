"""`resight search` finds a person in a gallery; `resight verify` compares two crops."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli.options import (
    DEFAULT_SERVER,
    CameraFilter,
    JsonOption,
    ServerOption,
    SubjectFilter,
    TrackFilter,
    connect,
    entry_cells,
    read_crop,
    write_json,
)


class GroupByChoice(StrEnum):
    """Values of --group-by."""

    SUBJECT = "subject"
    TRACK = "track"
    CAMERA = "camera"


def search(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP file with the crop of one person.")],
    collection: Annotated[str, typer.Option(help="Name of the collection to search.")],
    server: ServerOption = DEFAULT_SERVER,
    top_k: Annotated[int, typer.Option(help="Number of entries, or groups, to show.")] = 10,
    shots: Annotated[
        list[Path] | None, typer.Option("--shots", help="Another crop of the same person's track; may be repeated.")
    ] = None,
    group_by: Annotated[
        GroupByChoice | None, typer.Option(help="Show one hit for each subject, track or camera.")
    ] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank by k-reciprocal neighbours.")] = False,
    camera: CameraFilter = None,
    exclude_camera: Annotated[
        list[str] | None, typer.Option("--exclude-camera", help="Not of this camera; may be repeated.")
    ] = None,
    subject: SubjectFilter = None,
    track: TrackFilter = None,
    min_similarity: Annotated[float | None, typer.Option(help="Minimum similarity of hits, -1..1.")] = None,
    min_probability: Annotated[float | None, typer.Option(help="Minimum probability of hits, 0..1.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Find the person of a crop in a gallery.

    Example: `resight search person.jpg --collection lobby --exclude-camera door --group-by subject`
    """
    from resight.client import Where

    where = Where(
        camera_ids=camera or (),
        exclude_camera_ids=exclude_camera or (),
        subject_ids=subject or (),
        track_ids=track or (),
    )
    crops = [read_crop(path) for path in (image, *(shots or ()))]
    with connect(server) as client:
        result = client.search(
            collection,
            crops if shots else crops[0],
            top_k=top_k,
            where=where,
            min_similarity=min_similarity,
            min_probability=min_probability,
            group_by=None if group_by is None else group_by.value,
            rerank=rerank,
        )
    table = Table(title=f"{len(result.hits)} nearest to {image.name} in {collection}")
    has_decision = result.decision is not None
    columns = ["rank", "similarity", *(("probability", "decision") if has_decision else ())]
    for column in (*columns, "entry", "subject", "camera", "track", "captured"):
        table.add_column(column, justify="right" if column in ("rank", "similarity", "probability") else "left")
    for rank, hit in enumerate(result.hits, 1):
        words = (_percent(hit.probability), hit.decision) if has_decision else ()
        captured = str(hit.entry.capture_time or "")
        table.add_row(str(rank), f"{hit.similarity:.4f}", *words, *entry_cells(hit.entry)[:4], captured)
    Console().print(table)
    if result.shots_rejected:
        Console(stderr=True).print(f"{result.shots_rejected} of {len(crops)} shots were rejected")
    write_json(json_file, asdict(result))


def verify(
    left: Annotated[Path, typer.Argument(help="Crop of one person.")],
    right: Annotated[Path, typer.Argument(help="Crop of the same or another person.")],
    collection: Annotated[str, typer.Option(help="Collection whose model and thresholds are used.")],
    server: ServerOption = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Compare two crops. Example: `resight verify a.jpg b.jpg --collection lobby`."""
    with connect(server) as client:
        found = client.verify(collection, read_crop(left), read_crop(right))
    words = f", probability {_percent(found.probability)}: {found.decision}" if found.decision else ""
    Console().print(f"similarity {found.similarity:.4f}{words}", highlight=False)
    write_json(json_file, asdict(found))


def _percent(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.1%}"
