"""The commands ``resight snapshot …``: copies of a gallery, made, checked and put back on a stopped server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from resight.service.snapshot import Manifest

snapshot = typer.Typer(help="Copy a gallery, check copies and put one back.", no_args_is_help=True)

Data = Annotated[Path, typer.Option(help="Folder of the gallery.")]
Tenant = Annotated[str, typer.Option(help="Whose gallery.")]
Name = Annotated[str, typer.Argument(help="Of the snapshot: a-z, 0-9, '.', '_' and '-'.")]


@snapshot.command()
def create(
    data: Data,
    name: Annotated[str, typer.Argument(help="Of the new snapshot; from the time when left out.")] = "",
    tenant: Tenant = "default",
) -> None:
    """Copy the gallery of a stopped server; a running one is asked with the API's CreateSnapshot.

    Example: `resight snapshot create monday --data gallery`
    """
    from resight.service import snapshot as copies
    from resight.service.folder import DATABASE_FILE, DataFolder

    place = _place(data, tenant)
    with DataFolder(data):
        _tell(copies.create(place / DATABASE_FILE, name or copies.name_of_now()))


@snapshot.command("list")
def list_(data: Data, tenant: Tenant = "default") -> None:
    """Tell which snapshots there are; their content is not read.

    Example: `resight snapshot list --data gallery`
    """
    from resight.service import snapshot as copies

    for one in copies.listed(_place(data, tenant)):
        _tell(one)


@snapshot.command()
def verify(name: Name, data: Data, tenant: Tenant = "default") -> None:
    """Read a snapshot whole and compare it with its manifest; also while the server runs.

    Example: `resight snapshot verify monday --data gallery`
    """
    from resight.service import snapshot as copies

    _tell(copies.verify(_place(data, tenant), name))


@snapshot.command()
def restore(name: Name, data: Data, tenant: Tenant = "default") -> None:
    """Put a snapshot in the place of the gallery of a stopped server.

    Who was erased since it was made does not come back. Everything else that was written since is gone, except the
    audit.

    Example: `resight snapshot restore monday --data gallery`
    """
    from rich.console import Console

    from resight.service.folder import DataFolder
    from resight.service.restore import restore as put_back

    place = _place(data, tenant)
    with DataFolder(data):
        done = put_back(place, name)
    _tell(done.manifest)
    Console().print(f"restored; {done.erased_count} entries of erased people were left out", highlight=False)


def _place(data: Path, tenant: str) -> Path:
    """Where a tenant's database stands; the folder must be there, it is not made.

    Raises:
        InputError: no folder there, or no name of a tenant.
    """
    from resight.errors import InputError
    from resight.service.folder import tenant_folder

    place = tenant_folder(data, tenant)
    if not place.is_dir():
        raise InputError(
            f"there is no gallery in {place}: name the folder of one with --data, and --tenant if it has any"
        )
    return place


def _tell(one: Manifest) -> None:
    from rich.console import Console

    line = f"{one.name}  {one.created}  {one.entries} entries  {one.bytes} bytes  sha256 {one.sha256}"
    Console(soft_wrap=True).print(line, highlight=False, markup=False)
