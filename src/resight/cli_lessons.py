"""The commands that teach: ``resight gallery confirm | reject | feedback``, and ``resight models adapt``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli_connect import connect
from resight.cli_gallery import DEFAULT_SERVER, Name, Server, read_crop
from resight.cli_json import JsonOption, write_json
from resight.errors import CropsMissingError, InputError

if TYPE_CHECKING:
    from resight.client import Client

EntryId = Annotated[str, typer.Argument(help="Id of an entry.")]
Other = Annotated[str | None, typer.Argument(help="Id of the other entry; or give --image.")]
Image = Annotated[
    Path | None, typer.Option(help="A crop to enrol first, as the other entry; its file's name is its id.")
]
Camera = Annotated[str, typer.Option(help="Camera that saw the crop of --image.")]


def confirm(
    name: Name,
    entry: EntryId,
    other: Other = None,
    image: Image = None,
    camera: Camera = "",
    server: Server = DEFAULT_SERVER,
) -> None:
    """Say that two entries show one person. Example: `resight gallery confirm lobby 0001.jpg 0042.jpg`.

    The next adaptation of the site learns from it. A crop given by --image gets the subject of ENTRY.
    """
    with connect(server) as client:
        other = _other(client, name, entry, other, image, camera, same=True)
        client.confirm(name, entry, other)
    Console().print(f"{entry} and {other} show one person", highlight=False)


def reject(
    name: Name,
    entry: EntryId,
    other: Other = None,
    image: Image = None,
    camera: Camera = "",
    server: Server = DEFAULT_SERVER,
) -> None:
    """Say that two entries show two people. Example: `resight gallery reject lobby 0001.jpg --image seen.jpg`."""
    with connect(server) as client:
        other = _other(client, name, entry, other, image, camera, same=False)
        client.reject(name, entry, other)
    Console().print(f"{entry} and {other} show two people", highlight=False)


def feedback(
    name: Name,
    remove: Annotated[
        tuple[str, str] | None, typer.Option(help="Take back what was said of these two entries.", metavar="A B")
    ] = None,
    server: Server = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """List what was confirmed and rejected, or take one back. Example: `resight gallery feedback lobby`."""
    with connect(server) as client:
        if remove is not None:
            client.remove_feedback(name, *remove)
        found = list(client.list_feedback(name))
    table = Table("entry", "other entry", "verdict", "by", "when", title=f"{len(found)} pairs of {name}")
    for one in found:
        verdict = "one person" if one.same else "two people"
        table.add_row(one.entry_id, one.other_entry_id, verdict, one.principal, f"{one.time:%Y-%m-%d %H:%M}")
    Console().print(table)
    write_json(json_file, [asdict(one) for one in found])


def ask_to_adapt(
    site: Annotated[str, typer.Argument(help="Name of the site, as in its site.toml.")],
    server: Server = DEFAULT_SERVER,
) -> None:
    """Ask the cycle of a site for a run. Example: `resight models adapt lobby`.

    The server starts nothing itself: `resight cycle run` of that site, wherever it runs, takes it up.
    """
    with connect(server) as client:
        asked = client.start_adaptation(site)
    Console().print(
        f"asked for an adaptation of {site}: operation {asked.operation_id} is {asked.state}", highlight=False
    )


def _other(
    client: Client, name: str, entry: str, other: str | None, image: Path | None, camera: str, *, same: bool
) -> str:
    """The id of the other entry, enrolled from a file where one is given.

    Raises:
        InputError: neither or both are given, or the file cannot be read.
        CropsMissingError: the collection keeps no crops, so that nothing could be learned from it.
    """
    from resight.client import NewEntry

    if (other is None) == (image is None):
        raise InputError("a pair is of two entries: give the id of the other one, or --image with its crop")
    if image is None:
        assert other is not None
        return other
    found = client.get_entry(name, entry)
    if not client.collection(name).keep_crops:
        raise CropsMissingError(
            f"collection {name} keeps no crops, so nothing could be learned from {image}: "
            f"`resight gallery update {name} --keep-crops`, then enrol it"
        )
    subject = found.subject_id if same else ""
    return client.enrol(name, NewEntry(read_crop(image), image.name, subject, camera)).entry_id
