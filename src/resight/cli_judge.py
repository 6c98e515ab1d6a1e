"""`resight judge`: how good a model is on a site, and whether it may take another's place, without anyone's label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from resight.cli_evaluate import open_model
from resight.cli_json import JsonOption, write_json
from resight.cli_judge_table import figures_table, tell_hygiene, tell_missing, tell_verdict
from resight.cli_train import METHODS, WEIGHTS_HELP, DeviceOption, SiteOption
from resight.errors import InputError

if TYPE_CHECKING:
    from resight.training.agreement import LinkedCrops
    from resight.training.crops import CropStore
    from resight.training.hygiene import Hygiene
    from resight.training.latency import Latency, Model
    from resight.training.trial import Trial

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
    from resight.training.gate import gate
    from resight.training.gate_page import write_gate_page
    from resight.training.recipe import load_recipe
    from resight.training.run import require_device
    from resight.training.trial import hold_trial

    require_device(device)
    asked = {"reference": reference, "page": page, "latency": latency or max_ratio}
    if against is None and any(asked.values()):
        alone = ", ".join(f"--{name}" for name, value in asked.items() if value)
        raise InputError(f"{alone} sets two models side by side: add --against OTHER, the model in use")
    settings = load_recipe(recipe).cluster
    store, linked, hygiene = _site(site, every=every, names=names)
    kept = None if reference is None else _site(reference, every=True, names=names)
    candidate = open_model(model, device)
    active = None if against is None else open_model(against, device)
    trial = hold_trial(store, linked, candidate, active, settings, seed=seed, device=device)
    earlier = None if kept is None else hold_trial(*kept[:2], candidate, active, settings, seed=seed, device=device)
    timed = None
    if active is not None and (latency or max_ratio):
        timed = _timed(store, active, candidate, max_ratio)
    rivals = trial.rivals
    verdict = None
    if rivals is not None:
        verdict = gate(rivals, reference=None if earlier is None else earlier.rivals, hygiene=hygiene, latency=timed)
    console = Console()
    console.print(figures_table(trial, f"{model} on {len(store)} crops of {site}", against))
    if earlier is not None and kept is not None:
        console.print(figures_table(earlier, f"{model} on {len(kept[0])} crops of {reference}", against))
    tell_missing(console, trial)
    tell_hygiene(console, hygiene)
    if timed is not None:
        console.print(
            f"a batch takes {timed.ratio:.2f} [{timed.low:.2f}, {timed.high:.2f}] times as long", soft_wrap=True
        )
    if verdict is not None:
        tell_verdict(console, verdict)
    told = {"model": model, "against": against, "site": str(site), "all": every, "recipe": recipe, "seed": seed}
    answer: dict[str, Any] = _answer(trial) | {"hygiene": {name: found.to_json() for name, found in hygiene.items()}}
    if verdict is not None:
        answer |= {
            "verdict": verdict.to_json(),
            "reference": None if earlier is None else _answer(earlier),
            "latency": None if timed is None else vars(timed),
        }
    write_json(json_file, {**answer, "settings": {**told, "reference": reference and str(reference)}})
    if page is not None and verdict is not None:
        write_gate_page(page, trial, earlier, verdict, hygiene, timed, names=(model, str(against)))


def _site(root: Path, *, every: bool, names: bool) -> tuple[CropStore, LinkedCrops | None, dict[str, Hygiene]]:
    """The crops to judge on, those that links name, and what is wrong with crops.

    Raises:
        SiteError: no site, or no crop that can be decoded.
    """
    from resight.training.agreement import linked_crops
    from resight.training.crops import usable_crops
    from resight.training.datasets import open_site
    from resight.training.hygiene import examine
    from resight.training.judge import held_out, join_splits

    opened = open_site(root, tracks_from_names=names)
    back = None if every else held_out(opened)
    judged = usable_crops(join_splits(opened) if every else opened.train if back is None else back)
    hygiene = {"crops judged on": examine(judged)}
    if back is not None:
        hygiene["crops adapted to"] = examine(opened.train)
    return judged, linked_crops(join_splits(opened)), hygiene


def _timed(store: CropStore, active: Model, candidate: Model, limit: float | None) -> Latency:
    """Both models on the first crops of a store."""
    from resight.image import decode
    from resight.training.latency import BATCH, measure_latency

    crops = [decode(store.read(row)) for row in range(min(BATCH, len(store)))]
    return measure_latency(active, candidate, crops, limit=limit)


def _answer(trial: Trial) -> dict[str, Any]:
    """Figures of one model or both."""
    figures = {"model": trial.candidate.judgement.to_json()}
    return figures if trial.active is None else figures | {"against": trial.active.judgement.to_json()}
