"""`resight demo`: the whole road in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resight.cli_json import JsonOption, write_json


def demo(
    site: Annotated[Path | None, typer.Option(help="A labelled site; synthetic people are drawn without one.")] = None,
    init: Annotated[str, typer.Option(help="Initial weights, as `resight adapt` takes them.")] = "builtin",
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo makes; an earlier demo's gives way.")
    ] = Path("demo"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of each stage; by default the recipe's, 4 on drawn people.")
    ] = None,
    iters: Annotated[
        int | None, typer.Option(min=1, help="Batches an epoch; by default the recipe's, 64 on drawn people.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the site and of every stream of chance.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Walk the whole road: adapt without labels, export, serve, search, and compare before and after.

    Example: `resight demo --site market/ --init osnet_x0_25_msmt17.pth --json figures.json`
    """
    from rich.console import Console

    from resight.demo import Road, walk

    write_json(json_file, walk(Road(site, init, out, epochs, iters, seed, device, Console(stderr=True))))
