"""`resight cycle demo`: the cycle on a simulated site, night by night."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resight.cli_json import JsonOption, write_json


def cycle_demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo makes; an earlier demo's gives way.")
    ] = Path("cycle-demo"),
    visitors: Annotated[int, typer.Option(min=8, help="People who come each night.")] = 45,
    enrolled: Annotated[int, typer.Option(min=4, help="People who are searched for.")] = 40,
    cameras: Annotated[int, typer.Option(min=2, help="Cameras on the first night; one more hangs later.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each stage of training.")] = 1,
    iters: Annotated[int, typer.Option(min=1, help="Batches an epoch.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of cameras, people and walks.")] = 1,
    json_file: JsonOption = None,
) -> None:
    """Let the cycle keep up a site that is drawn: four nights of film, one of them poisoned, and a rollback.

    Example: `resight cycle demo --out nights/ --json figures.json`

    Exit status 1: something it is to show did not come about.
    """
    from rich.console import Console

    from resight.cycle_demo import walk_nights
    from resight.nights_road import NightRoad, Scale

    scale = Scale(visitors, enrolled, cameras, epochs, iters)
    figures = walk_nights(NightRoad(out, scale, seed, Console(stderr=True)))
    write_json(json_file, figures)
    if not all(kept for _, kept in figures["promises"]):
        raise typer.Exit(1)
