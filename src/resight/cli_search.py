"""The commands ``resight search`` and ``resight verify``: who is it, and are they the same."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from resight.cli_connect import connect
from resight.cli_gallery import DEFAULT_SERVER, Cameras, Server, Subjects, Tracks, cells, read_crop
from resight.cli_json import JsonOption, write_json


class Group(StrEnum):
    """What hits are grouped by."""

    SUBJECT = "subject"
    TRACK = "track"
    CAMERA = "camera"


def search(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP file with the crop of one person.")],
    collection: Annotated[str, typer.Option(help="Name of the collection to search.")],
    server: Server = DEFAULT_SERVER,
    top_k: Annotated[int, typer.Option(help="How many entries, or groups, to show.")] = 10,
    shots: Annotated[
        list[Path] | None, typer.Option("--shots", help="Another crop of the same person's track; may be repeated.")
    ] = None,
    group_by: Annotated[Group | None, typer.Option(help="One hit for each person, track or camera.")] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Order by k-reciprocal neighbours.")] = False,
    camera: Cameras = None,
    exclude_camera: Annotated[
        list[str] | None, typer.Option("--exclude-camera", help="Not of this camera; may be repeated.")
    ] = None,
    subject: Subjects = None,
    track: Tracks = None,
    min_similarity: Annotated[float | None, typer.Option(help="Leave out entries below it, -1..1.")] = None,
    min_probability: Annotated[float | None, typer.Option(help="Leave out less probable entries, 0..1.")] = None,
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
        answer = client.search(
            collection,
            crops if shots else crops[0],
            top_k=top_k,
            where=where,
            min_similarity=min_similarity,
            min_probability=min_probability,
            group_by=None if group_by is None else group_by.value,
            rerank=rerank,
        )
    table = Table(title=f"{len(answer.hits)} nearest to {image.name} in {collection}")
    judged = answer.decision is not None
    columns = ["rank", "similarity", *(("probability", "decision") if judged else ())]
    for column in (*columns, "entry", "subject", "camera", "track", "captured"):
        table.add_column(column, justify="right" if column in ("rank", "similarity", "probability") else "left")
    for rank, hit in enumerate(answer.hits, 1):
        words = (_percent(hit.probability), hit.decision) if judged else ()
        captured = str(hit.entry.capture_time or "")
        table.add_row(str(rank), f"{hit.similarity:.4f}", *words, *cells(hit.entry)[:4], captured)
    Console().print(table)
    if answer.shots_rejected:
        Console(stderr=True).print(f"{answer.shots_rejected} of {len(crops)} shots were left out")
    write_json(json_file, asdict(answer))


def verify(
    left: Annotated[Path, typer.Argument(help="Crop of one person.")],
    right: Annotated[Path, typer.Argument(help="Crop of the same or another person.")],
    collection: Annotated[str, typer.Option(help="Collection whose model and thresholds decide.")],
    server: Server = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Compare two crops. Example: `resight verify a.jpg b.jpg --collection lobby`."""
    with connect(server) as client:
        found = client.verify(collection, read_crop(left), read_crop(right))
    told: dict[str, Any] = asdict(found)
    words = f", probability {_percent(found.probability)}: {found.decision}" if found.decision else ""
    Console().print(f"similarity {found.similarity:.4f}{words}", highlight=False)
    write_json(json_file, told)


def _percent(probability: float | None) -> str:
    return "" if probability is None else f"{probability:.1%}"
