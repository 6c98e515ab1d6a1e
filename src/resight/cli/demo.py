"""`resight demo`: all steps on one site in one command; `resight cycle demo`: the cycle on a simulated site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resight.cli.options import JsonOption, write_json


def demo(
    site: Annotated[Path | None, typer.Option(help="Labelled site. [default: synthetic people]")] = None,
    init: Annotated[str, typer.Option(help="Initial weights, as for `resight adapt --init`.")] = "builtin",
    out: Annotated[Path, typer.Option(help="Output folder; the output of an earlier demo is deleted.")] = Path("demo"),
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of each stage. [default: the recipe's; 4 for synthetic people]")
    ] = None,
    iters: Annotated[
        int | None, typer.Option(min=1, help="Batches per epoch. [default: the recipe's; 64 for synthetic people]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random number generators.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Run all steps: adapt without labels, export, serve, search, and compare the scores before and after.

    Example: `resight demo --site market/ --init osnet_x0_25_msmt17.pth --json figures.json`
    """
    from rich.console import Console

    from resight.demo.adaptation import AdaptationDemo, run_demo

    write_json(json_file, run_demo(AdaptationDemo(site, init, out, epochs, iters, seed, device, Console(stderr=True))))


def cycle_demo(
    out: Annotated[Path, typer.Option(help="Output folder; the output of an earlier demo is deleted.")] = Path(
        "cycle-demo"
    ),
    visitors: Annotated[int, typer.Option(min=8, help="People filmed each night.")] = 45,
    enrolled: Annotated[int, typer.Option(min=4, help="People enrolled and searched for.")] = 40,
    cameras: Annotated[int, typer.Option(min=2, help="Cameras on the first night; one more is added later.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each stage of training.")] = 1,
    iters: Annotated[int, typer.Option(min=1, help="Batches per epoch.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of cameras, people and their paths.")] = 1,
    json_file: JsonOption = None,
) -> None:
    """Run the cycle on a simulated site: four nights of film, one of them poisoned, and a rollback.

    Example: `resight cycle demo --out nights/ --json figures.json`

    Exit status 1: a claim of the demo did not hold.
    """
    from rich.console import Console

    from resight.demo.nights import DemoScale, NightsDemo, run_nights_demo

    scale = DemoScale(visitors, enrolled, cameras, epochs, iters)
    figures = run_nights_demo(NightsDemo(out, scale, seed, Console(stderr=True)))
    write_json(json_file, figures)
    if not all(holds for _, holds in figures["promises"]):
        raise typer.Exit(1)
