"""The command ``resight token``: who may call the server of a data folder, and as what."""

from __future__ import annotations

import enum
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.errors import InputError

token = typer.Typer(
    help="Make, list and revoke the tokens of a server; a running one follows within a second.", no_args_is_help=True
)

DAY_PARTS = {"h": timedelta(hours=1), "d": timedelta(days=1)}


class RoleName(enum.StrEnum):
    """The words of `resight.service.auth.Role`."""

    READER = "reader"
    ENROLLER = "enroller"
    OPERATOR = "operator"
    ADMIN = "admin"


Data = Annotated[Path, typer.Option(help="Data folder of the server.", envvar="RESIGHT_DATA")]
Name = Annotated[str, typer.Argument(help="Whose token: a program, a camera, a person.")]


@token.command()
def create(
    name: Name,
    role: Annotated[RoleName, typer.Option(help="The least that does: each may do what those before it may.")],
    data: Data,
    tenant: Annotated[str, typer.Option(help="Whose galleries it opens.")] = "default",
    expires: Annotated[str | None, typer.Option(help="When it stops to count: 12h, 90d. [default: never]")] = None,
) -> None:
    """Make a token and print it, this once: the server keeps only its SHA-256.

    Example: `resight token create analytics --role reader --expires 90d --data gallery`
    """
    from resight.service.auth import Role
    from resight.service.tokens import TokenFile

    lives = None if expires is None else _lives(expires)
    secret, made = TokenFile(data).create(name, Role[role.name], tenant=tenant, lives=lives)
    until = "never expires" if made.expires is None else f"expires {made.expires:%Y-%m-%d %H:%M} UTC"
    Console(stderr=True).print(
        f"token {made.token_id} of {name}, {role.value} in tenant {tenant}, {until}; it is shown this once:",
        highlight=False,
        soft_wrap=True,
    )
    typer.echo(secret)


@token.command("list")
def list_tokens(data: Data) -> None:
    """Show what tokens there are, never their text. Example: `resight token list --data gallery`."""
    from datetime import UTC, datetime

    from resight.service.tokens import TokenFile

    found, now = TokenFile(data).read(), datetime.now(UTC)
    table = Table(title=f"{len(found)} tokens of {data}")
    for column in ("name", "id", "role", "tenant", "created", "expires"):
        table.add_column(column)
    for one in found:
        expires = "never" if one.expires is None else f"{one.expires:%Y-%m-%d %H:%M}"
        state = expires if one.active(now) else f"{expires}, over"
        table.add_row(one.name, one.token_id, one.role.word, one.tenant, f"{one.created:%Y-%m-%d %H:%M}", state)
    Console().print(table)


@token.command()
def revoke(
    name: Name,
    data: Data,
    token_id: Annotated[str | None, typer.Option("--id", help="Only this one of them.")] = None,
) -> None:
    """Take the tokens of a name away. Example: `resight token revoke analytics --id 3f0c12ab --data gallery`."""
    from resight.service.tokens import TokenFile

    gone = TokenFile(data).revoke(name, token_id=token_id)
    Console().print(f"revoked {gone} of {name}; a running server refuses it within a second", highlight=False)


def _lives(text: str) -> timedelta:
    """How long a token counts."""
    if not re.fullmatch(r"[1-9]\d{0,4}[hd]", text):  # 99999 days are 273 years
        raise InputError(f"a lifetime is a number with h or d, such as 90d, found {text!r}")
    return int(text[:-1]) * DAY_PARTS[text[-1]]
