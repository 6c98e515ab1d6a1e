"""How every command that talks to a server reaches it: TLS and a token, from options or the environment.

The token itself is never an option, for the list of processes shows those to everybody.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resight.errors import InputError

if TYPE_CHECKING:
    from resight.client import Client

TOKEN_VARIABLE = "RESIGHT_TOKEN"
VARIABLES = {
    "token_file": "RESIGHT_TOKEN_FILE",
    "tls_ca": "RESIGHT_TLS_CA",
    "client_cert": "RESIGHT_CLIENT_CERT",
    "client_key": "RESIGHT_CLIENT_KEY",
}


@dataclass(frozen=True)
class Access:
    """The files that open a server's door; None = not needed."""

    token_file: Path | None = None
    tls_ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


_access: ContextVar[Access] = ContextVar("resight_access")


def access(
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token; or {TOKEN_VARIABLE}.", envvar=VARIABLES["token_file"])
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="PEM authorities of the server's certificate.", envvar=VARIABLES["tls_ca"])
    ] = None,
    client_cert: Annotated[
        Path | None, typer.Option(help="PEM certificate of this client.", envvar=VARIABLES["client_cert"])
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option(help="PEM private key of it.", envvar=VARIABLES["client_key"])
    ] = None,
) -> None:
    """Keep what the options before a command say for `connect`."""
    _access.set(Access(token_file, tls_ca, client_cert, client_key))


def connect(server: str) -> Client:
    """A client of a server, with the access that the command line and the environment give.

    Raises:
        InputError: a file cannot be read, or the token would travel in clear.
    """
    from resight.client import Client

    found = _access.get(None) or _from_environment()
    return Client(
        server,
        token=_token(found.token_file),
        tls_ca=found.tls_ca,
        tls_cert=found.client_cert,
        tls_key=found.client_key,
    )


def _from_environment() -> Access:
    """What the options would be, for a program that is no command, such as a container's health check."""
    named = {name: os.environ.get(variable) for name, variable in VARIABLES.items()}
    return Access(**{name: Path(text) for name, text in named.items() if text})


def _token(file: Path | None) -> str | None:
    """The token of the file, of the environment, or none."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token file {file} cannot be read: name the file that holds the token") from error
