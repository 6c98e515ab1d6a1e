"""The commands of ``resight gallery``: a server's galleries from the command line."""

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


@gallery.command()
def create(
    name: Name,
    ttl: Annotated[str | None, typer.Option(help="How long entries live: 12h, 30d.")] = None,
    keep_forever: Annotated[bool, typer.Option("--keep-forever", help="Entries never expire.")] = False,
    keep_crops: Annotated[bool, typer.Option("--keep-crops", help="Keep the images, to embed them anew.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Make an empty collection. Example: `resight gallery create lobby --ttl 30d`."""
    lives = None if ttl is None else duration(ttl)
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
            entries = [NewEntry(read_crop(file), file.name, subject, camera, track, replace=replace) for file in part]
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
        table.add_row(*cells(entry))
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
def update(
    name: Name,
    entry_id: Annotated[
        str | None, typer.Argument(help="Id of an entry; without it the collection is changed.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="Of an entry: who it shows; '' takes the name away.")] = None,
    ttl: Annotated[
        str | None, typer.Option(help="How long new entries live, or from now on this one: 12h, 30d.")
    ] = None,
    max_entries: Annotated[int | None, typer.Option(help="Entries it may hold; 0 = no limit.", min=0)] = None,
    keep_crops: Annotated[bool | None, typer.Option("--keep-crops/--drop-crops", help="Keep the images.")] = None,
    min_quality: Annotated[float | None, typer.Option(help="Refuse worse crops at enrolment, 0..1.")] = None,
    accept: Annotated[float | None, typer.Option(help="Match from this probability on; 0 = the bundle's.")] = None,
    reject: Annotated[float | None, typer.Option(help="Unknown below this one; 0 = the bundle's.")] = None,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Change a collection's settings, or an entry. Example: `resight gallery update lobby 0001.jpg --subject anna`."""
    from datetime import UTC, datetime

    from resight.client import CollectionChange

    lives = None if ttl is None else duration(ttl)
    change = CollectionChange(None if entry_id else lives, max_entries, keep_crops, accept, reject, min_quality)
    if entry_id is not None and change != CollectionChange():
        raise InputError("an entry has a subject and a time to live; the other settings are its collection's")
    if entry_id is None and subject is not None:
        raise InputError("a collection has no subject: name the entry to change")
    with connect(server) as client:
        if entry_id is None:
            client.update_collection(name, change)
        else:
            expires = None if lives is None else datetime.now(UTC) + lives
            client.update_entry(name, entry_id, subject_id=subject, expire_time=expires)
    Console().print(f"changed {entry_id or name}", highlight=False)


@gallery.command()
def erase(
    subject: Annotated[str, typer.Argument(help="Who is to be forgotten.")],
    collection: Annotated[str, typer.Option(help="Only in this collection; else in all.")] = "",
    reason: Annotated[str, typer.Option(help="For the audit.")] = "",
    server: Server = DEFAULT_SERVER,
) -> None:
    """Erase a person for good. Example: `resight gallery erase anna --reason "asked on 3 May"`."""
    with connect(server) as client:
        done = client.erase_subject(subject, collection=collection, reason=reason)
    Console().print(f"erased {done.count} entries, audit row {done.audit_id}", highlight=False)
    if not done.storage_scrubbed:
        Console(stderr=True).print("the log on the disk could not be emptied yet: a reader held it; erase again to see")
        raise typer.Exit(1)


@gallery.command()
def stats(name: Name, server: Server = DEFAULT_SERVER, json_file: JsonOption = None) -> None:
    """Show how a collection and its index stand. Example: `resight gallery stats lobby`."""
    with connect(server) as client:
        found = asdict(client.stats(name))
    table = Table("figure", "value", title=name)
    for figure, value in found.items():
        table.add_row(figure, "" if value is None else str(value))
    Console().print(table)
    write_json(json_file, found)


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


def read_crop(path: Path) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: name an image file") from error


def duration(text: str) -> timedelta:
    """A time such as ``30d``."""
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS or not number.isdigit():
        raise InputError(f"a time to live is a number with s, m, h or d, such as 30d, found {text!r}")
    return timedelta(seconds=int(number) * UNITS[unit])


def cells(entry: Any) -> tuple[str, str, str, str, str, str]:
    """An entry as a table shows it: id, subject, camera, track, quality and expiry."""
    expires = "never" if entry.expire_time is None else f"{entry.expire_time:%Y-%m-%d %H:%M}"
    return entry.entry_id, entry.subject_id, entry.camera_id, entry.track_id, f"{entry.quality:.2f}", expires
