"""`resight judge`: how good a model is on a site, and whether it may take another's place, without anyone's label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from resight.cli_evaluate import open_model
from resight.cli_json import JsonOption, write_json
from resight.cli_judge_table import tell_case
from resight.cli_train import METHODS, WEIGHTS_HELP, DeviceOption, SiteOption
from resight.errors import InputError

AGAINST_HELP = "The model in use, of the same kinds: adds a verdict on whether MODEL may take its place."
REFERENCE_HELP = "Crop store of earlier nights, on which MODEL must be no worse either."
RATIO_HELP = "Refuse a MODEL that takes longer than so many times the other's time; turns --latency on."
NAMES_HELP = "Take tracks from Market-1501 names: reads who is seen, to measure the judge itself."


def judge(
    model: Annotated[str, typer.Option(help=f"Bundle folder, or weights: {WEIGHTS_HELP}")],
    site: SiteOption,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help=AGAINST_HELP)] = None,
    reference: Annotated[Path | None, typer.Option(metavar="STORE", help=REFERENCE_HELP)] = None,
    page: Annotated[Path | None, typer.Option(metavar="F.html", help="Write the verdict as a page.")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time both models on one batch, in turns.")] = False,
    max_ratio: Annotated[float | None, typer.Option("--max-latency-ratio", min=0.01, help=RATIO_HELP)] = None,
    every: Annotated[bool, typer.Option("--all", help="Judge on query and gallery crops too.")] = False,
    names: Annotated[bool, typer.Option("--tracks-from-names", help=NAMES_HELP)] = False,
    recipe: Annotated[str, typer.Option(help=f"Whose clustering is used: {METHODS}.")] = "purify-camera",
    seed: Annotated[int, typer.Option(min=0, help="Seed of pairs and resamples.")] = 0,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Judge a model on a site's crops by tracks and clusters; nobody's label is read.

    Tracks kept back from adaptation (a gallery without queries) are judged on where the store has such.

    Example: `resight judge --model site-model --site crops/ --against active.bundle --json verdict.json`

    Example: `resight judge --model new --site night/ --reference kept/ --against active.bundle --page verdict.html`
    """
    from resight.training.case import hear, open_ground
    from resight.training.gate_page import write_gate_page
    from resight.training.recipe import load_recipe
    from resight.training.run import require_device

    require_device(device)
    asked = {"reference": reference, "page": page, "latency": latency or max_ratio}
    if against is None and any(asked.values()):
        alone = ", ".join(f"--{name}" for name, value in asked.items() if value)
        raise InputError(f"{alone} sets two models side by side: add --against OTHER, the model in use")
    settings = load_recipe(recipe).cluster
    ground = open_ground(site, every=every, tracks_from_names=names)
    earlier = None if reference is None else open_ground(reference, every=True, tracks_from_names=names)
    candidate = open_model(model, device)
    active = None if against is None else open_model(against, device)
    case = hear(ground, earlier, candidate, active, settings, timed=latency, limit=max_ratio, seed=seed, device=device)
    tell_case(Console(), case, model, against)
    told = {"model": model, "against": against, "site": str(site), "all": every, "recipe": recipe, "seed": seed}
    told["reference"] = None if reference is None else str(reference)
    write_json(json_file, {**case.to_json(), "settings": told})
    if page is not None:
        write_gate_page(page, case, names=(model, str(against)))
