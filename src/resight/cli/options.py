"""Options and helpers shared by commands: ``--json``, the connection to a server, filters, and table cells.

Commands reach a server with TLS and a token, from options or the environment. The token itself is never an option,
because the list of processes would show it to everybody.
"""

from __future__ import annotations

import json
import os
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resight.errors import InputError
from resight.files import write_atomic

if TYPE_CHECKING:
    from resight.client import Client


JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the results to this file, as JSON.")]


def write_json(path: Path | None, value: Any) -> None:
    """Write a result as JSON; missing folders are created, so that a long run does not fail at its end."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


TOKEN_VARIABLE = "RESIGHT_TOKEN"
ENVIRONMENT_VARIABLES = {
    "token_file": "RESIGHT_TOKEN_FILE",
    "tls_ca": "RESIGHT_TLS_CA",
    "client_cert": "RESIGHT_CLIENT_CERT",
    "client_key": "RESIGHT_CLIENT_KEY",
}


@dataclass(frozen=True)
class ServerAccess:
    """The credential files for a server; None = not needed."""

    token_file: Path | None = None
    tls_ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


_access: ContextVar[ServerAccess] = ContextVar("resight_access")


def access(
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token; or {TOKEN_VARIABLE}.", envvar=ENVIRONMENT_VARIABLES["token_file"]),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of the CA of the server's certificate.", envvar=ENVIRONMENT_VARIABLES["tls_ca"]),
    ] = None,
    client_cert: Annotated[
        Path | None, typer.Option(help="PEM certificate of this client.", envvar=ENVIRONMENT_VARIABLES["client_cert"])
    ] = None,
    client_key: Annotated[
        Path | None,
        typer.Option(help="PEM private key of that certificate.", envvar=ENVIRONMENT_VARIABLES["client_key"]),
    ] = None,
) -> None:
    """Store the global options for `connect`."""
    _access.set(ServerAccess(token_file, tls_ca, client_cert, client_key))


def connect(server: str) -> Client:
    """A client of a server, with credentials from the command line and the environment.

    Raises:
        InputError: a file cannot be read, or the token would be sent unencrypted.
    """
    from resight.client import Client

    found = _access.get(None) or _from_environment()
    return Client(
        server,
        token=_read_token(found.token_file),
        tls_ca=found.tls_ca,
        tls_cert=found.client_cert,
        tls_key=found.client_key,
    )


def _from_environment() -> ServerAccess:
    """The same options from the environment, for programs other than commands, such as a container's health check."""
    named = {name: os.environ.get(variable) for name, variable in ENVIRONMENT_VARIABLES.items()}
    return ServerAccess(**{name: Path(text) for name, text in named.items() if text})


def _read_token(file: Path | None) -> str | None:
    """The token from the file or from the environment, if any."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {file} cannot be read: name the file that holds the token") from error


SITE_HELP = "Market-1501 folder, plain folder (one sub-folder per camera) or crop store."
SiteOption = Annotated[Path, typer.Option("--site", help=SITE_HELP)]
RECIPES_HELP = "purify-camera (best), purify, o2cap, cluster-contrast, selective, supervised"
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
WEIGHTS_HELP = "'builtin', 'resnet18', 'resnet50', a .pth or .onnx file, or a checkpoint folder."


ServerOption = Annotated[str, typer.Option(help="HOST:PORT of the server.", envvar="RESIGHT_SERVER")]
CollectionName = Annotated[str, typer.Argument(help="Name of the collection.")]
CameraFilter = Annotated[list[str] | None, typer.Option("--camera", help="Only of this camera; may be repeated.")]
SubjectFilter = Annotated[list[str] | None, typer.Option("--subject", help="Only of this subject; may be repeated.")]
TrackFilter = Annotated[list[str] | None, typer.Option("--track", help="Only of this track; may be repeated.")]

DEFAULT_SERVER = "127.0.0.1:50051"
DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_crop(path: Path) -> bytes:
    """A file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: name an image file") from error


def parse_duration(text: str) -> timedelta:
    """Parse a duration such as ``30d``."""
    number, unit = text[:-1], text[-1:]
    if unit not in DURATION_UNITS or not number.isdigit():
        raise InputError(f"a duration is a number with s, m, h or d, such as 30d, found {text!r}")
    return timedelta(seconds=int(number) * DURATION_UNITS[unit])


def entry_cells(entry: Any) -> tuple[str, str, str, str, str, str]:
    """The cells of an entry in a table: id, subject, camera, track, quality and expiry."""
    expires = "never" if entry.expire_time is None else f"{entry.expire_time:%Y-%m-%d %H:%M}"
    return entry.entry_id, entry.subject_id, entry.camera_id, entry.track_id, f"{entry.quality:.2f}", expires


def figure_cell(value: float | None) -> str:
    """The cell of a figure in a table."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
