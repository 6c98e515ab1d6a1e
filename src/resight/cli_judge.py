"""`resight judge`: how good a model is on a site, and whether it is better than another, without anyone's label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli_evaluate import open_model
from resight.cli_json import JsonOption, write_json
from resight.cli_train import METHODS, WEIGHTS_HELP, DeviceOption, SiteOption

if TYPE_CHECKING:
    from resight.errors import TrainingError
    from resight.training.cluster import Clustering, ClusterSettings
    from resight.training.crops import CropStore
    from resight.training.judge import Judgement, Verdict
    from resight.training.neighbours import Floats

AGAINST_HELP = "The model in use, of the same kinds: adds a verdict on whether MODEL may take its place."
COLOURS = {"promote": "green", "refuse": "red", "undecided": "yellow"}


def judge(
    model: Annotated[str, typer.Option(help=f"Bundle folder, or weights: {WEIGHTS_HELP}")],
    site: SiteOption,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help=AGAINST_HELP)] = None,
    every: Annotated[bool, typer.Option("--all", help="Judge on query and gallery crops too.")] = False,
    recipe: Annotated[str, typer.Option(help=f"Whose clustering is used: {METHODS}.")] = "purify-camera",
    seed: Annotated[int, typer.Option(min=0, help="Seed of pairs and resamples.")] = 0,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Judge a model on a site's crops by tracks and clusters; nobody's label is read.

    Example: `resight judge --model site-model --site crops/ --against active.bundle --json verdict.json`
    """
    from resight.training.crops import usable_crops
    from resight.training.datasets import open_site
    from resight.training.judge import compare, join_splits
    from resight.training.judge import judge as judge_features
    from resight.training.recipe import load_recipe
    from resight.training.run import require_device

    require_device(device)
    settings = load_recipe(recipe).cluster
    opened = open_site(site)
    store = usable_crops(join_splits(opened) if every else opened.train)
    features, clustering = _look(model, store, settings, device)
    other = None if against is None else _look(against, store, settings, device)
    judged = judge_features(
        features, store, clustering=clustering, previous=None if other is None else other[1], seed=seed
    )
    compared = None if other is None else judge_features(other[0], store, clustering=other[1], seed=seed)
    verdict = None if compared is None else compare(compared, judged)
    console = Console()
    console.print(_table(judged, compared, f"{model} on {len(store)} crops of {opened.name}", against))
    for name, reason in judged.separation.missing.items():
        console.print(f"no {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if verdict is not None:
        _tell(console, verdict)
    answer: dict[str, Any] = {"model": judged.to_json()}
    if compared is not None and verdict is not None:
        answer |= {"against": compared.to_json(), "verdict": verdict.to_json()}
    asked = {"model": model, "against": against, "site": str(site), "all": every, "recipe": recipe, "seed": seed}
    write_json(json_file, {**answer, "settings": asked})


def _look(
    model: str, store: CropStore, settings: ClusterSettings, device: str
) -> tuple[Floats, Clustering | TrainingError]:
    """Features of the crops and what they cluster to."""
    from resight.training.evaluate import embed_store
    from resight.training.judge import try_cluster

    spec, embed = open_model(model, device)
    features = embed_store(store, spec, embed)
    return features, try_cluster(features, store, settings, device=device)


def _table(judged: Judgement, compared: Judgement | None, title: str, against: str | None) -> Table:
    """Every figure a line, the other model's beside it."""
    table = Table("figure", "model", title=escape(title))
    sides = [_lines(judged)]
    if compared is not None:
        table.add_column(escape(str(against)))
        sides.append(_lines(compared))
    for name in sides[0]:
        table.add_row(name, *(escape(side.get(name, "")) for side in sides))
    return table


def _lines(judged: Judgement) -> dict[str, str]:
    """Names and values; a dash where something could not be measured."""
    counts, clusters, agreed = judged.counts, judged.clusters, judged.stability
    lines = {"tracks": f"{counts.tracks}, {counts.overlaps} pairs overlap"}
    lines["crop pairs"] = f"{counts.positives} of one person, {counts.negatives} of two"
    for name in (*judged.separation.figures, *judged.separation.missing):
        figure = judged.separation.figures.get(name)
        lines[name] = "-" if figure is None else f"{figure.value:.4f} [{figure.low:.4f}, {figure.high:.4f}]"
    lines["variance"] = _number(judged.variance)
    mix, kept = (None, None) if clusters is None else (clusters.cameras, clusters.tracks)
    lines["clusters"] = "-" if clusters is None else f"{clusters.clusters}"
    lines["outliers"] = _number(None if clusters is None else clusters.outlier_share)
    lines["largest cluster"] = _number(None if clusters is None else clusters.largest_share)
    lines["silhouette"] = _number(None if clusters is None else clusters.silhouette)
    lines["cameras a cluster"] = (
        "-" if mix is None else f"{mix.cameras_per_cluster:.2f} ({mix.chance_cameras_per_cluster:.2f} by chance)"
    )
    lines["tracks in one cluster"] = _number(None if kept is None else kept.whole_share)
    lines["two persons in one cluster"] = _number(None if kept is None else kept.confused_share)
    if agreed is not None:
        lines["agreement of both (ARI)"] = f"{agreed.ari:.4f}"
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tell(console: Console, verdict: Verdict) -> None:
    """The decision and why."""
    colour = COLOURS[verdict.decision]
    console.print(f"[bold {colour}]{verdict.decision}[/bold {colour}] by {verdict.evidence}")
    for reason in verdict.reasons:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
