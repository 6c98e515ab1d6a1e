"""`resight serve`, and the commands around a server.

`doctor` checks an installation, `token` manages access, `snapshot` copies, verifies and restores a stopped server's
gallery.
"""

from __future__ import annotations

import enum
import logging
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli.options import JsonOption, write_json
from resight.errors import InputError

if TYPE_CHECKING:
    from resight.service.storage.snapshots import SnapshotManifest


def serve(
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder that `resight export` made.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the gallery; created if missing.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder of more bundles, for `resight models load`.")] = None,
    trusted_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-key",
            help="Minisign public key, or a file with it; may be repeated. Bundles must then be signed.",
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT; port 0 = any free port. [default: 127.0.0.1:50051]")
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Execution provider: cpu, cuda, ort-tensorrt or tensorrt. [default: cpu]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Precision of the graph. [default: fp32]")] = None,
    device_id: Annotated[int | None, typer.Option(help="Index of the GPU. [default: 0]")] = None,
    engine_cache: Annotated[
        Path | None, typer.Option(help="Folder of TensorRT engines. [default: ~/.cache/resight/engines]")
    ] = None,
    reflection: Annotated[
        bool | None,
        typer.Option("--reflection/--no-reflection", help="Enable gRPC server reflection. [default: on loopback only]"),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate with its chain; enables TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate, mode 0600.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of the CA that client certificates must be signed by.")
    ] = None,
    behind_tls_proxy: Annotated[
        bool | None,
        typer.Option(
            "--behind-tls-proxy", help="Allow listening off loopback without TLS, because a proxy terminates TLS."
        ),
    ] = None,
    gallery: Annotated[str | None, typer.Option(help="embedded, or milvus://HOST:PORT. [default: embedded]")] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option("--metrics", help="HOST:PORT of /metrics, /livez and /readyz over HTTP. [default: none]"),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="Format of the log: text or json. [default: text]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; options override it.")] = None,
) -> None:
    """Serve a bundle over gRPC until SIGTERM or Ctrl-C.

    Example: `resight serve --bundle lobby.bundle --data gallery`

    If the data folder contains tokens (`resight token create`), every call needs one; calls from other machines always
    need a token and TLS (docs/security.md).

    Every setting can also be given as an environment variable (RESIGHT_MAX_BATCH=16) or in the file.
    """
    flags = dict(locals())  # named like the settings
    import asyncio

    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it logs every library it tries to load
    from resight.service.app import run
    from resight.service.monitoring.setup import configure_logging
    from resight.service.settings import load_settings

    settings = load_settings(**flags)
    configure_logging(settings.log_format)
    asyncio.run(run(settings))


CHECK_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    data: Annotated[Path | None, typer.Option(help="Folder of a gallery; its server may be running.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder.")] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of a running server.")] = None,
    json: JsonOption = None,
) -> None:
    """Check this machine, a gallery, a bundle and a server, and print problems with next steps; changes nothing.

    Example: `resight doctor --data gallery --bundle lobby.bundle --server localhost:50051`

    Exit status 1 if a check failed; 0 if there are only warnings.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from resight.cli.options import connect
    from resight.service.monitoring import doctor as checks
    from resight.service.monitoring.doctor import check_data

    found = checks.check_machine()
    if bundle is not None:
        found += checks.check_bundle(bundle)
    if data is not None:
        found += check_data(data)
    if server is not None:
        found += checks.check_server(lambda: connect(server))
    table = Table("area", "check", "", "found", "next step", title="resight doctor")
    for one in found:
        colour = CHECK_COLOURS[one.verdict]
        cells = (f"[{colour}]{one.verdict}[/{colour}]", escape(one.found), escape(one.next_step))
        table.add_row(one.area, escape(one.name), *cells)
    Console().print(table)
    write_json(json, [asdict(one) for one in found])
    if any(one.verdict == "fail" for one in found):
        raise typer.Exit(1)


token = typer.Typer(
    help="Create, list and revoke the tokens of a server; effective within a second.", no_args_is_help=True
)

LIFETIME_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1)}


class RoleName(enum.StrEnum):
    """The names of `resight.service.access.auth.Role`."""

    READER = "reader"
    ENROLLER = "enroller"
    OPERATOR = "operator"
    ADMIN = "admin"


ServerDataOption = Annotated[Path, typer.Option(help="Data folder of the server.", envvar="RESIGHT_DATA")]
TokenName = Annotated[str, typer.Argument(help="Name of the holder: a program, a camera, a person.")]


@token.command("create")
def create_token(
    name: TokenName,
    role: Annotated[RoleName, typer.Option(help="Role; each includes the permissions of the previous ones.")],
    data: ServerDataOption,
    tenant: Annotated[str, typer.Option(help="Tenant whose galleries it gives access to.")] = "default",
    expires: Annotated[str | None, typer.Option(help="Lifetime: 12h, 90d. [default: unlimited]")] = None,
) -> None:
    """Create a token and print it once: the server stores only its SHA-256.

    Example: `resight token create analytics --role reader --expires 90d --data gallery`
    """
    from resight.service.access.auth import Role, TokenFile

    lifetime = None if expires is None else _parse_lifetime(expires)
    secret, made = TokenFile(data).create(name, Role[role.name], tenant=tenant, lifetime=lifetime)
    until = "never expires" if made.expires is None else f"expires {made.expires:%Y-%m-%d %H:%M} UTC"
    Console(stderr=True).print(
        f"token {made.token_id} of {name}, {role.value} in tenant {tenant}, {until}; it is shown only once:",
        highlight=False,
        soft_wrap=True,
    )
    typer.echo(secret)


@token.command("list")
def list_tokens(data: ServerDataOption) -> None:
    """List the tokens, without their text. Example: `resight token list --data gallery`."""
    from datetime import UTC, datetime

    from resight.service.access.auth import TokenFile

    found, now = TokenFile(data).read(), datetime.now(UTC)
    table = Table(title=f"{len(found)} tokens of {data}")
    for column in ("name", "id", "role", "tenant", "created", "expires"):
        table.add_column(column)
    for one in found:
        expires = "never" if one.expires is None else f"{one.expires:%Y-%m-%d %H:%M}"
        state = expires if one.active(now) else f"{expires}, expired"
        table.add_row(one.name, one.token_id, one.role.word, one.tenant, f"{one.created:%Y-%m-%d %H:%M}", state)
    Console().print(table)


@token.command()
def revoke(
    name: TokenName,
    data: ServerDataOption,
    token_id: Annotated[str | None, typer.Option("--id", help="Only the token with this id.")] = None,
) -> None:
    """Revoke the tokens of a name. Example: `resight token revoke analytics --id 3f0c12ab --data gallery`."""
    from resight.service.access.auth import TokenFile

    gone = TokenFile(data).revoke(name, token_id=token_id)
    Console().print(f"revoked {gone} of {name}; a running server refuses it within a second", highlight=False)


def _parse_lifetime(text: str) -> timedelta:
    """Parse the lifetime of a token."""
    if not re.fullmatch(r"[1-9]\d{0,4}[hd]", text):  # 99999 days are 273 years
        raise InputError(f"a lifetime is a number with h or d, such as 90d, found {text!r}")
    return int(text[:-1]) * LIFETIME_UNITS[text[-1]]


snapshot = typer.Typer(help="Create, verify and restore snapshots of a gallery.", no_args_is_help=True)

GalleryDataOption = Annotated[Path, typer.Option(help="Folder of the gallery.")]
TenantOption = Annotated[str, typer.Option(help="Tenant of the gallery.")]
SnapshotName = Annotated[str, typer.Argument(help="Name of the snapshot: a-z, 0-9, '.', '_' and '-'.")]


@snapshot.command("create")
def create_snapshot(
    data: GalleryDataOption,
    name: Annotated[str, typer.Argument(help="Name of the new snapshot. [default: from the time]")] = "",
    tenant: TenantOption = "default",
) -> None:
    """Create a snapshot of a stopped server's gallery; for a running server, use the API's CreateSnapshot.

    Example: `resight snapshot create monday --data gallery`
    """
    from resight.service.storage import snapshots as copies
    from resight.service.storage.data_folder import DATABASE_FILE, DataFolder

    place = _tenant_folder(data, tenant)
    with DataFolder(data):
        _print_snapshot(copies.create(place / DATABASE_FILE, name or copies.timestamp_name()))


@snapshot.command("list")
def list_snapshots(data: GalleryDataOption, tenant: TenantOption = "default") -> None:
    """List the snapshots, without reading their content.

    Example: `resight snapshot list --data gallery`
    """
    from resight.service.storage import snapshots as copies

    for one in copies.list_manifests(_tenant_folder(data, tenant)):
        _print_snapshot(one)


@snapshot.command()
def verify(name: SnapshotName, data: GalleryDataOption, tenant: TenantOption = "default") -> None:
    """Verify a snapshot against its manifest; the server may be running.

    Example: `resight snapshot verify monday --data gallery`
    """
    from resight.service.storage import snapshots as copies

    _print_snapshot(copies.verify(_tenant_folder(data, tenant), name))


@snapshot.command()
def restore(name: SnapshotName, data: GalleryDataOption, tenant: TenantOption = "default") -> None:
    """Replace the gallery of a stopped server by a snapshot.

    Subjects erased since the snapshot stay erased. All other changes since then are lost, except the audit log.

    Example: `resight snapshot restore monday --data gallery`
    """
    from rich.console import Console

    from resight.service.storage.data_folder import DataFolder
    from resight.service.storage.snapshots import restore as restore_snapshot

    place = _tenant_folder(data, tenant)
    with DataFolder(data):
        done = restore_snapshot(place, name)
    _print_snapshot(done.manifest)
    Console().print(f"restored; {done.erased_count} entries of erased subjects were left out", highlight=False)


def _tenant_folder(data: Path, tenant: str) -> Path:
    """The folder of a tenant's database; it must exist.

    Raises:
        InputError: the folder does not exist, or the tenant's name is not valid.
    """
    from resight.errors import InputError
    from resight.service.storage.data_folder import tenant_folder

    place = tenant_folder(data, tenant)
    if not place.is_dir():
        raise InputError(
            f"there is no gallery in {place}: expected the folder of one in --data, and its tenant in --tenant"
        )
    return place


def _print_snapshot(one: SnapshotManifest) -> None:
    from rich.console import Console

    line = f"{one.name}  {one.created}  {one.entries} entries  {one.bytes} bytes  sha256 {one.sha256}"
    Console(soft_wrap=True).print(line, highlight=False, markup=False)
