"""The command ``resight doctor``: looks at the machine, a bundle, a gallery and a server, and says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resight.cli_json import JsonOption, write_json

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    data: Annotated[Path | None, typer.Option(help="Folder of a gallery; its server may run.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder of a model.")] = None,
    server: Annotated[str | None, typer.Option(help="HOST:PORT of a running server.")] = None,
    json: JsonOption = None,
) -> None:
    """Look at this machine and at what is named, and tell what is wrong and what to do; nothing is changed.

    Example: `resight doctor --data gallery --bundle lobby.bundle --server localhost:50051`

    Exit status 1 when a check failed; warnings leave it at 0.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from resight.cli_connect import connect
    from resight.service import doctor as checks
    from resight.service.doctor_data import data as look_at_data

    found = checks.machine()
    if bundle is not None:
        found += checks.bundle(bundle)
    if data is not None:
        found += look_at_data(data)
    if server is not None:
        found += checks.server(lambda: connect(server))
    table = Table("area", "check", "", "found", "next step", title="resight doctor")
    for one in found:
        colour = COLOURS[one.verdict]
        told = (f"[{colour}]{one.verdict}[/{colour}]", escape(one.found), escape(one.next_step))
        table.add_row(one.area, escape(one.name), *told)
    Console().print(table)
    write_json(json, [asdict(one) for one in found])
    if any(one.verdict == "fail" for one in found):
        raise typer.Exit(1)
