"""The commands ``resight search`` and ``resight gallery``: a server's galleries from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table

from resight.cli_connect import connect
from resight.cli_json import JsonOption, write_json
from resight.errors import InputError, ReIDError

gallery = typer.Typer(help="Create, fill, list and empty the galleries of a running server.", no_args_is_help=True)

Server = Annotated[str, typer.Option(help="HOST:PORT of the server.", envvar="RESIGHT_SERVER")]
Name = Annotated[str, typer.Argument(help="Name of the collection.")]
Cameras = Annotated[list[str] | None, typer.Option("--camera", help="Only of this camera; may be repeated.")]
Subjects = Annotated[list[str] | None, typer.Option("--subject", help="Only of this subject; may be repeated.")]
Tracks = Annotated[list[str] | None, typer.Option("--track", help="Only of this track; may be repeated.")]

DEFAULT_SERVER = "127.0.0.1:50051"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PART = 256  # crops read from disk at a time
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def search(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP file with the crop of one person.")],
    collection: Annotated[str, typer.Option(help="Name of the collection to search.")],
    server: Server = DEFAULT_SERVER,
    top_k: Annotated[int, typer.Option(help="How many entries to show.")] = 10,
    camera: Cameras = None,
    exclude_camera: Annotated[
        list[str] | None, typer.Option("--exclude-camera", help="Not of this camera; may be repeated.")
    ] = None,
    subject: Subjects = None,
    track: Tracks = None,
    min_similarity: Annotated[float | None, typer.Option(help="Leave out entries below it, -1..1.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Find the person of a crop in a gallery.

    Example: `resight search person.jpg --collection lobby --exclude-camera door`
    """
    from resight.client import Where

    where = Where(
        camera_ids=camera or (),
        exclude_camera_ids=exclude_camera or (),
        subject_ids=subject or (),
        track_ids=track or (),
    )
    with connect(server) as client:
        answer = client.search(collection, _read(image), top_k=top_k, where=where, min_similarity=min_similarity)
    table = Table(title=f"{len(answer.hits)} nearest to {image.name} in {collection}")
    for column in ("rank", "similarity", "entry", "subject", "camera", "track", "captured"):
        table.add_column(column, justify="right" if column in ("rank", "similarity") else "left")
    for rank, hit in enumerate(answer.hits, 1):
        table.add_row(str(rank), f"{hit.similarity:.4f}", *_cells(hit.entry)[:4], str(hit.entry.capture_time or ""))
    Console().print(table)
    write_json(json_file, asdict(answer))


@gallery.command()
def create(
    name: Name,
    ttl: Annotated[str | None, typer.Option(help="How long entries live: 12h, 30d.")] = None,
    keep_forever: Annotated[bool, typer.Option("--keep-forever", help="Entries never expire.")] = False,
    keep_crops: Annotated[bool, typer.Option("--keep-crops", help="Keep the images, to embed them anew.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Make an empty collection. Example: `resight gallery create lobby --ttl 30d`."""
    lives = None if ttl is None else _duration(ttl)
    with connect(server) as client:
        made = client.create_collection(name, ttl=lives, unlimited_retention=keep_forever, keep_crops=keep_crops)
    Console().print(f"created {made.name} for features of {made.model}, space {made.space_id[:12]}", highlight=False)


@gallery.command("list")
def list_collections(server: Server = DEFAULT_SERVER, json_file: JsonOption = None) -> None:
    """Show all collections. Example: `resight gallery list`."""
    with connect(server) as client:
        found = list(client.collections())
    table = Table(title=f"{len(found)} collections on {server}")
    for column in ("collection", "entries", "entries live", "crops", "model", "space"):
        table.add_column(column, justify="right" if column == "entries" else "left")
    for one in found:
        lives = "for good" if one.ttl is None else str(one.ttl)
        kept = "kept" if one.keep_crops else "not kept"
        table.add_row(one.name, str(one.entry_count), lives, kept, one.model, one.space_id[:12])
    Console().print(table)
    write_json(json_file, [asdict(one) for one in found])


@gallery.command()
def enrol(
    name: Name,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    camera: Annotated[str, typer.Option(help="Camera that saw them.")] = "",
    subject: Annotated[str, typer.Option(help="Who they show.")] = "",
    track: Annotated[str, typer.Option(help="Track they are of.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Let entries of the same id give way.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Enrol crops; a file's name is its entry's id. Example: `resight gallery enrol lobby crops/ --camera door`.

    A file that is no usable crop is reported and left out; the command then ends with status 1.
    """
    from resight.client import NewEntry

    console = Console(stderr=True)
    files = list(_files(images))
    refused = 0
    with connect(server) as client:
        client.collection(name)  # an unknown collection is told before any file is read
        starts = range(0, len(files), PART)
        for start in progress(starts, description="enrol", console=console):
            part = files[start : start + PART]
            entries = [NewEntry(_read(file), file.name, subject, camera, track, replace=replace) for file in part]
            for file, outcome in zip(part, client.enrol_batch(name, entries), strict=True):
                if isinstance(outcome, ReIDError):
                    refused += 1
                    console.print(f"[yellow]{file}[/yellow]: {outcome}", highlight=False, soft_wrap=True)
    console.print(f"enrolled {len(files) - refused} of {len(files)} crops in {name}", highlight=False)
    if refused:
        raise typer.Exit(1)


@gallery.command()
def get(
    name: Name,
    entry_id: Annotated[str, typer.Argument(help="Id of the entry.")],
    server: Server = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Show one entry. Example: `resight gallery get lobby 0001.jpg`."""
    with connect(server) as client:
        found = asdict(client.get_entry(name, entry_id))
    table = Table("field", "value", title=f"{entry_id} in {name}")
    for field, value in found.items():
        table.add_row(field, "" if value is None else str(value))
    Console().print(table)
    write_json(json_file, found)


@gallery.command()
def entries(
    name: Name,
    camera: Cameras = None,
    subject: Subjects = None,
    track: Tracks = None,
    limit: Annotated[int, typer.Option(help="Show at most so many.", min=1)] = 100,
    server: Server = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """List entries in order of enrolment. Example: `resight gallery entries lobby --camera door`."""
    from itertools import islice

    from resight.client import Where

    where = Where(camera_ids=camera or (), subject_ids=subject or (), track_ids=track or ())
    with connect(server) as client:
        found = list(islice(client.entries(name, where=where, page_size=min(limit, 1000)), limit))
    table = Table(title=f"{len(found)} entries of {name}")
    for column in ("entry", "subject", "camera", "track", "quality", "expires"):
        table.add_column(column, justify="right" if column == "quality" else "left")
    for entry in found:
        table.add_row(*_cells(entry))
    Console().print(table)
    write_json(json_file, [asdict(entry) for entry in found])


@gallery.command()
def delete(
    name: Name,
    entry_ids: Annotated[list[str] | None, typer.Argument(help="Ids of entries.")] = None,
    camera: Cameras = None,
    subject: Subjects = None,
    track: Tracks = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what a filter would delete.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Delete entries by id, or by filter. Example: `resight gallery delete lobby --subject anna`."""
    from resight.client import Where

    where = Where(camera_ids=camera or (), subject_ids=subject or (), track_ids=track or ())
    if bool(entry_ids) == (where != Where()):
        raise InputError("delete either entries by their ids or what passes a filter: give one of the two")
    with connect(server) as client:
        if entry_ids:
            for entry_id in entry_ids:
                client.delete_entry(name, entry_id)
            count = len(entry_ids)
        else:
            count = client.delete_entries(name, where, dry_run=dry_run)
    Console().print(f"{'would delete' if dry_run else 'deleted'} {count} entries of {name}", highlight=False)


@gallery.command()
def drop(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Also when it has entries.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Delete a collection with all it holds. Example: `resight gallery drop lobby --force`."""
    with connect(server) as client:
        client.delete_collection(name, force=force)
    Console().print(f"dropped {name}", highlight=False)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files named, and the images in the folders named, by name."""
    for path in paths:
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise InputError(f"folder {path} holds no {', '.join(SUFFIXES)} file: name another")
        yield from found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: name an image file") from error


def _duration(text: str) -> timedelta:
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS or not number.isdigit():
        raise InputError(f"a time to live is a number with s, m, h or d, such as 30d, found {text!r}")
    return timedelta(seconds=int(number) * UNITS[unit])


def _cells(entry: Any) -> tuple[str, str, str, str, str, str]:
    expires = "never" if entry.expire_time is None else f"{entry.expire_time:%Y-%m-%d %H:%M}"
    return entry.entry_id, entry.subject_id, entry.camera_id, entry.track_id, f"{entry.quality:.2f}", expires
