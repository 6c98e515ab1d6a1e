"""`resight gallery`: the collections of a server, their entries, feedback on pairs, and search statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track as progress
from rich.table import Table

from resight.cli.options import (
    DEFAULT_SERVER,
    CameraFilter,
    CollectionName,
    JsonOption,
    ServerOption,
    SubjectFilter,
    TrackFilter,
    connect,
    entry_cells,
    figure_cell,
    parse_duration,
    read_crop,
    write_json,
)
from resight.errors import CropsMissingError, InputError, ReIDError

if TYPE_CHECKING:
    from resight.client import Client


gallery = typer.Typer(
    help="Manage the collections of a running server, their entries, feedback and statistics.", no_args_is_help=True
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
READ_BATCH = 256  # crops read from disk at a time


@gallery.command()
def create(
    name: CollectionName,
    ttl: Annotated[str | None, typer.Option(help="Time to live of entries: 12h, 30d.")] = None,
    keep_forever: Annotated[bool, typer.Option("--keep-forever", help="Entries never expire.")] = False,
    keep_crops: Annotated[
        bool, typer.Option("--keep-crops", help="Store the images, to embed them again with later models.")
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Create an empty collection. Example: `resight gallery create lobby --ttl 30d`."""
    lives = None if ttl is None else parse_duration(ttl)
    with connect(server) as client:
        made = client.create_collection(name, ttl=lives, unlimited_retention=keep_forever, keep_crops=keep_crops)
    Console().print(f"created {made.name} for features of {made.model}, space {made.space_id[:12]}", highlight=False)


@gallery.command("list")
def list_collections(server: ServerOption = DEFAULT_SERVER, json_file: JsonOption = None) -> None:
    """List all collections. Example: `resight gallery list`."""
    with connect(server) as client:
        found = list(client.collections())
    table = Table(title=f"{len(found)} collections on {server}")
    for column in ("collection", "entries", "time to live", "crops", "model", "space"):
        table.add_column(column, justify="right" if column == "entries" else "left")
    for one in found:
        lives = "unlimited" if one.ttl is None else str(one.ttl)
        kept = "kept" if one.keep_crops else "not kept"
        table.add_row(one.name, str(one.entry_count), lives, kept, one.model, one.space_id[:12])
    Console().print(table)
    write_json(json_file, [asdict(one) for one in found])


@gallery.command()
def enrol(
    name: CollectionName,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    camera: Annotated[str, typer.Option(help="Camera of the crops.")] = "",
    subject: Annotated[str, typer.Option(help="Subject of the entries.")] = "",
    track: Annotated[str, typer.Option(help="Track of the crops.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace entries of the same id.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Enrol crops; the file name becomes the entry id. Example: `resight gallery enrol lobby crops/ --camera door`.

    Unusable files are reported and skipped; the exit status is then 1.
    """
    from resight.client import NewEntry

    console = Console(stderr=True)
    files = list(_image_files(images))
    refused = 0
    with connect(server) as client:
        client.collection(name)  # an unknown collection is reported before any file is read
        starts = range(0, len(files), READ_BATCH)
        for start in progress(starts, description="enrol", console=console):
            part = files[start : start + READ_BATCH]
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
    name: CollectionName,
    entry_id: Annotated[str, typer.Argument(help="Id of the entry.")],
    server: ServerOption = DEFAULT_SERVER,
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
    name: CollectionName,
    camera: CameraFilter = None,
    subject: SubjectFilter = None,
    track: TrackFilter = None,
    limit: Annotated[int, typer.Option(help="Maximum number of entries.", min=1)] = 100,
    server: ServerOption = DEFAULT_SERVER,
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
        table.add_row(*entry_cells(entry))
    Console().print(table)
    write_json(json_file, [asdict(entry) for entry in found])


@gallery.command()
def delete(
    name: CollectionName,
    entry_ids: Annotated[list[str] | None, typer.Argument(help="Ids of entries.")] = None,
    camera: CameraFilter = None,
    subject: SubjectFilter = None,
    track: TrackFilter = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the entries that would be deleted.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Delete entries by id, or by filter. Example: `resight gallery delete lobby --subject anna`."""
    from resight.client import Where

    where = Where(camera_ids=camera or (), subject_ids=subject or (), track_ids=track or ())
    if bool(entry_ids) == (where != Where()):
        raise InputError("expected either entry ids or a filter")
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
    name: CollectionName,
    entry_id: Annotated[str | None, typer.Argument(help="Id of an entry. [default: change the collection]")] = None,
    subject: Annotated[str | None, typer.Option(help="Subject of the entry; '' removes it.")] = None,
    ttl: Annotated[
        str | None, typer.Option(help="Time to live of new entries, or of this entry from now on: 12h, 30d.")
    ] = None,
    max_entries: Annotated[int | None, typer.Option(help="Maximum number of entries; 0 = no limit.", min=0)] = None,
    keep_crops: Annotated[bool | None, typer.Option("--keep-crops/--drop-crops", help="Store the images.")] = None,
    min_quality: Annotated[float | None, typer.Option(help="Minimum quality of enrolled crops, 0..1.")] = None,
    accept: Annotated[
        float | None, typer.Option(help="Probability from which a hit is a match; 0 = the bundle's.")
    ] = None,
    reject: Annotated[
        float | None, typer.Option(help="Probability below which a hit is unknown; 0 = the bundle's.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Change a collection's settings, or an entry. Example: `resight gallery update lobby 0001.jpg --subject anna`."""
    from datetime import UTC, datetime

    from resight.client import CollectionChange

    lives = None if ttl is None else parse_duration(ttl)
    change = CollectionChange(None if entry_id else lives, max_entries, keep_crops, accept, reject, min_quality)
    if entry_id is not None and change != CollectionChange():
        raise InputError("only --subject and --ttl apply to an entry; the other options are settings of the collection")
    if entry_id is None and subject is not None:
        raise InputError("--subject needs the id of an entry")
    with connect(server) as client:
        if entry_id is None:
            client.update_collection(name, change)
        else:
            expires = None if lives is None else datetime.now(UTC) + lives
            client.update_entry(name, entry_id, subject_id=subject, expire_time=expires)
    Console().print(f"changed {entry_id or name}", highlight=False)


@gallery.command()
def erase(
    subject: Annotated[str, typer.Argument(help="Subject to erase.")],
    collection: Annotated[str, typer.Option(help="Only in this collection. [default: all]")] = "",
    reason: Annotated[str, typer.Option(help="Reason, for the audit log.")] = "",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Erase all entries of a subject permanently. Example: `resight gallery erase anna --reason "asked on 3 May"`."""
    with connect(server) as client:
        done = client.erase_subject(subject, collection=collection, reason=reason)
    Console().print(f"erased {done.count} entries, audit row {done.audit_id}", highlight=False)
    if not done.storage_scrubbed:
        Console(stderr=True).print(
            "the database log could not be truncated yet, because a reader holds it; run the command again later"
        )
        raise typer.Exit(1)


@gallery.command()
def stats(name: CollectionName, server: ServerOption = DEFAULT_SERVER, json_file: JsonOption = None) -> None:
    """Show the state of a collection and its index. Example: `resight gallery stats lobby`."""
    with connect(server) as client:
        found = asdict(client.stats(name))
    table = Table("figure", "value", title=name)
    for figure, value in found.items():
        table.add_row(figure, "" if value is None else str(value))
    Console().print(table)
    write_json(json_file, found)


@gallery.command()
def drop(
    name: CollectionName,
    force: Annotated[bool, typer.Option("--force", help="Also if it has entries.")] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Delete a collection with all its entries. Example: `resight gallery drop lobby --force`."""
    with connect(server) as client:
        client.delete_collection(name, force=force)
    Console().print(f"dropped {name}", highlight=False)


def _image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The given files, and the images in the given folders, sorted by name."""
    for path in paths:
        found = (
            sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not found:
            raise InputError(f"folder {path} holds no {', '.join(IMAGE_SUFFIXES)} file: choose another")
        yield from found


EntryIdArgument = Annotated[str, typer.Argument(help="Id of an entry.")]
OtherEntryArgument = Annotated[str | None, typer.Argument(help="Id of the other entry; or use --image.")]
OtherImageOption = Annotated[
    Path | None, typer.Option(help="Crop to enrol as the other entry; the file name becomes its id.")
]
OtherCameraOption = Annotated[str, typer.Option(help="Camera of the crop of --image.")]


def confirm(
    name: CollectionName,
    entry: EntryIdArgument,
    other: OtherEntryArgument = None,
    image: OtherImageOption = None,
    camera: OtherCameraOption = "",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Confirm that two entries show the same person. Example: `resight gallery confirm lobby 0001.jpg 0042.jpg`.

    The next adaptation of the site uses it. A crop of --image gets the subject of ENTRY.
    """
    with connect(server) as client:
        other = _other_entry_id(client, name, entry, other, image, camera, same=True)
        client.confirm(name, entry, other)
    Console().print(f"{entry} and {other} show the same person", highlight=False)


def reject(
    name: CollectionName,
    entry: EntryIdArgument,
    other: OtherEntryArgument = None,
    image: OtherImageOption = None,
    camera: OtherCameraOption = "",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Confirm that two entries differ. Example: `resight gallery reject lobby 0001.jpg --image seen.jpg`."""
    with connect(server) as client:
        other = _other_entry_id(client, name, entry, other, image, camera, same=False)
        client.reject(name, entry, other)
    Console().print(f"{entry} and {other} show different people", highlight=False)


def feedback(
    name: CollectionName,
    remove: Annotated[
        tuple[str, str] | None, typer.Option(help="Remove the feedback on these two entries.", metavar="A B")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """List the confirmed and rejected pairs, or remove one. Example: `resight gallery feedback lobby`."""
    with connect(server) as client:
        if remove is not None:
            client.remove_feedback(name, *remove)
        found = list(client.list_feedback(name))
    table = Table("entry", "other entry", "verdict", "by", "when", title=f"{len(found)} pairs of {name}")
    for one in found:
        verdict = "same person" if one.same else "different people"
        table.add_row(one.entry_id, one.other_entry_id, verdict, one.principal, f"{one.time:%Y-%m-%d %H:%M}")
    Console().print(table)
    write_json(json_file, [asdict(one) for one in found])


def _other_entry_id(
    client: Client, name: str, entry: str, other: str | None, image: Path | None, camera: str, *, same: bool
) -> str:
    """The id of the other entry; a crop from a file is enrolled first.

    Raises:
        InputError: neither or both of entry and image are given, or the file cannot be read.
        CropsMissingError: the collection keeps no crops, so an adaptation could not use the pair.
    """
    from resight.client import NewEntry

    if (other is None) == (image is None):
        raise InputError("expected either the id of the other entry, or --image with its crop")
    if image is None:
        assert other is not None
        return other
    found = client.get_entry(name, entry)
    if not client.collection(name).keep_crops:
        raise CropsMissingError(
            f"collection {name} keeps no crops, so an adaptation could not use {image}: "
            f"`resight gallery update {name} --keep-crops`, then enrol it"
        )
    subject = found.subject_id if same else ""
    return client.enrol(name, NewEntry(read_crop(image), image.name, subject, camera)).entry_id


SEARCH_COUNTS = ("searches", "matches", "uncertain", "unknown", "without_hit")
SEARCH_MEANS = ("unknown_share", "mean_cosine", "mean_probability", "drift_index", "mean_shift")


def statistics(
    name: CollectionName,
    last: Annotated[str | None, typer.Option(help="Only searches of this period until now: 12h, 7d.")] = None,
    space: Annotated[str, typer.Option(help="Only searches in this embedding space.")] = "",
    server: ServerOption = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Show statistics of the searches in a collection, one column per embedding space.

    Example: `resight gallery statistics lobby --last 24h`
    """
    start = None if last is None else datetime.now(UTC) - parse_duration(last)
    with connect(server) as client:
        found = client.search_statistics(name, start=start, space_id=space)
    console = Console()
    console.print(f"searches of {name}; * = its active space", highlight=False, soft_wrap=True)
    table = Table("figure", *(f"{one.model_id} {one.space_id[:8]}{' *' if one.active else ''}" for one in found))
    for figure in (*SEARCH_COUNTS, *SEARCH_MEANS):
        table.add_row(figure, *(figure_cell(getattr(one, figure)) for one in found))
    for figure in ("first_time", "last_time"):
        table.add_row(figure, *(f"{getattr(one, figure):%Y-%m-%d %H:%M}" for one in found))
    console.print(table)
    write_json(json_file, [asdict(one) for one in found])
