"""`resight evaluate` and `resight judge`: the scores of a model on a site, with and without labels.

`evaluate` measures a model on a site with known persons. `judge` judges it without labels, and decides whether it may
replace another model; the figures of both and the verdict are printed as tables.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli.options import RECIPES_HELP, WEIGHTS_HELP, DeviceOption, JsonOption, SiteOption, write_json
from resight.errors import InputError

if TYPE_CHECKING:
    from resight.arrays import Floats, Pixels
    from resight.image import ImageSpec
    from resight.training.evaluation.evaluate import SiteScore
    from resight.training.judging.candidate import CandidateResult, ModelComparison
    from resight.training.judging.gate import Verdict
    from resight.training.judging.judge import ModelJudgement
    from resight.training.judging.separation import Separation


PAIRS_SHOWN = 8  # more cameras do not fit a terminal; then only the worst pairs are listed
PLOT_HELP = "Draw CMC, open-set curve and camera pairs: F.png, .svg or .pdf."


def evaluate(
    model: Annotated[str, typer.Option(help=f"Bundle folder, or weights: {WEIGHTS_HELP}")],
    site: SiteOption,
    device: DeviceOption = "cpu",
    flip: Annotated[
        bool, typer.Option("--flip", help="Average the features of each crop and its mirror image.")
    ] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank by k-reciprocal neighbours.")] = False,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help=PLOT_HELP)] = None,
) -> None:
    """Measure a model on a site whose persons are known: closed set, open set and camera pairs.

    Example: `resight evaluate --model site-model --site market/ --json figures.json --plot figures.png`
    """
    from resight.neighbours.rerank import BALANCE, K1, K2
    from resight.training.evaluation.evaluate import evaluation_splits, measure_site, score_to_json
    from resight.training.evaluation.plots import check_plot_path, draw_evaluation
    from resight.training.features.extract import embed_store, require_device
    from resight.training.store.datasets import open_site

    require_device(device)
    if plot is not None:
        check_plot_path(plot)
    opened = open_site(site)
    evaluation_splits(opened)  # fails before a model is loaded
    spec, embed = open_model(model, device)
    score = measure_site(
        opened, lambda store: embed_store(store, spec, embed, flip=flip), reranked=rerank, device=device
    )
    extras = [name for name, on in (("flip average", flip), ("re-ranked", rerank)) if on]
    title = f"{model} on {opened.name}" + (f" ({', '.join(extras)})" if extras else "")
    console = Console()
    for table in (_closed_set(score, title), _open_set(score), _camera_pairs(score)):
        console.print(table)
    settings = {
        "model": model,
        "site": str(site),
        "device": device,
        "flip": flip,
        "rerank": {"k1": K1, "k2": K2, "lambda": BALANCE} if rerank else None,
    }
    write_json(json_file, {**score_to_json(score), "settings": settings})
    if plot is not None:
        draw_evaluation(plot, score, title)


def open_model(model: str, device: str) -> tuple[ImageSpec, Callable[[Pixels], Floats]]:
    """Image size and embedding, uint8 (B, H, W, 3) -> float32 (B, D) unit rows, of a bundle or weights."""
    from resight.bundle.bundle import is_bundle, open_bundle
    from resight.encoder.weights import load_weights
    from resight.training.features.extract import EXTRACTION_BATCH, encoder_embedding

    if not is_bundle(Path(model)):
        encoder = load_weights(model).encoder.to(device)
        return encoder.config.image, encoder_embedding(encoder, device)
    from resight.runtime.providers import open_runtime

    runtime = open_runtime(open_bundle(Path(model)), max_batch=EXTRACTION_BATCH)
    return runtime.image, runtime.embed


def _closed_set(score: SiteScore, title: str) -> Table:
    """Closed-set scores, as reported in papers."""
    from resight.training.evaluation.evaluate import percentages

    table = Table("mAP", "rank-1", "rank-5", "rank-10", "mINP", "valid queries", title=escape(title))
    table.add_row(*(f"{value:.2f}" for value in percentages(score.ranking).values()), str(score.ranking.valid_queries))
    return table


def _open_set(score: SiteScore) -> Table:
    """Threshold and rates at each FPIR."""
    from resight.training.evaluation.evaluate import OPEN_SET_RANKS, operating_points

    ranks = [f"TPIR, rank {rank}" for rank in OPEN_SET_RANKS]
    table = Table("FPIR", "threshold", *ranks, "note", title="open set: searches in two watch lists")
    if score.open_set is None:
        table.add_row("-", "-", *("-" for _ in ranks), escape(score.reservation))
        return table
    found = score.open_set
    for point in operating_points(found):
        threshold = "-" if point.threshold is None else f"{point.threshold:.4f}"
        rates = ("-" if share is None else f"{100 * share:.2f}" for share in point.tpir)
        table.add_row(f"{100 * point.target:g} %", threshold, *rates, point.reservation)
    mated, strangers = len(found.mated_similarity), len(found.nonmated_similarity)
    lists = " and ".join(f"{n} persons in {m} entries" for n, m in zip(found.persons, found.entries, strict=True))
    table.caption = f"{mated} mated and {strangers} non-mated searches; enrolled: {lists}"
    return table


def _camera_pairs(score: SiteScore) -> Table:
    """MAP and rank-1 of every pair of cameras; if there are many, of the worst pairs."""
    pairs, names = score.pairs, score.camera_names

    def cell(a: int, b: int) -> str:
        if not pairs.valid_queries[a, b]:
            return "-"
        return f"{100 * pairs.mAP[a, b]:.1f} / {100 * pairs.rank1[a, b]:.1f}"

    queries, galleries = ([escape(names[c]) for c in side] for side in (pairs.query_cameras, pairs.gallery_cameras))
    if len(galleries) <= PAIRS_SHOWN:
        title = "mAP / rank-1: query rows, gallery columns"
        table = Table("", *galleries, title=title)
        for a, name in enumerate(queries):
            table.add_row(name, *(cell(a, b) for b in range(len(galleries))))
        return table
    every = [(a, b) for a in range(len(queries)) for b in range(len(galleries)) if pairs.valid_queries[a, b]]
    worst = sorted(every, key=lambda pair: float(pairs.mAP[pair]))[: 2 * PAIRS_SHOWN]
    table = Table("query", "gallery", "mAP / rank-1", "queries", title=f"the {len(worst)} worst pairs of cameras")
    for a, b in worst:
        table.add_row(queries[a], galleries[b], cell(a, b), str(pairs.valid_queries[a, b]))
    return table


VERDICT_COLOURS = {"promote": "green", "refuse": "red", "undecided": "yellow"}


def print_judgement(console: Console, case: CandidateResult, model: str, against: str | None) -> None:
    """Print all figures, and the verdict last."""
    for words, trial in (("the site", case.site), ("earlier nights", case.reference), ("its adaptation", case.adapted)):
        if trial is not None:
            console.print(_judgement_table(trial, f"{model} on {len(trial.store)} crops of {words}", against))
    _print_missing(console, case.site)
    for which, found in case.hygiene.items():
        for problem in found.messages():
            console.print(f"{which}: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if case.latency is not None:
        timed = case.latency
        console.print(
            f"a batch takes {timed.ratio:.2f} [{timed.low:.2f}, {timed.high:.2f}] times as long",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if case.verdict is not None:
        _print_verdict(console, case.verdict)


def _judgement_table(trial: ModelComparison, title: str, against: str | None) -> Table:
    """A row for every figure, with a column for each model."""
    table = Table("figure", "model", title=escape(title))
    judged = trial.candidate.judgement
    sides = [_judgement_rows(judged)]
    if trial.active is not None:
        table.add_column(escape(str(against)))
        sides.append(_judgement_rows(trial.active.judgement))
    for name in sides[0]:
        table.add_row(escape(name), *(escape(side.get(name, "")) for side in sides))
    return table


def _print_missing(console: Console, trial: ModelComparison) -> None:
    """A line for each missing figure, with the reason."""
    judged = trial.candidate.judgement
    missing = {**judged.separation.missing, **judged.searches.missing}
    if judged.links is not None:
        missing |= {f"links {name}": reason for name, reason in judged.links.missing.items()}
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _print_verdict(console: Console, verdict: Verdict) -> None:
    """Print the decision and its reasons."""
    colour = VERDICT_COLOURS[verdict.decision]
    console.print(f"[bold {colour}]{verdict.decision}[/bold {colour}] by {verdict.evidence}")
    for reason in verdict.reasons:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)


def _judgement_rows(judged: ModelJudgement) -> dict[str, str]:
    """Names and values; a dash if a figure could not be measured."""
    counts, clusters, agreed = judged.counts, judged.clusters, judged.stability
    lines = {"tracks": f"{counts.tracks}, {counts.overlaps} pairs overlap"}
    lines["crop pairs"] = f"{counts.positives} of one person, {counts.negatives} of two"
    lines |= _estimates(judged.separation) | _estimates(judged.searches)
    for name, found in judged.cameras.items():
        lines[f"auc of {name}"] = _estimates(found)["auc"]
    if judged.links is not None:
        lines |= {f"links {name}": text for name, text in _estimates(judged.links).items()}
    lines["variance"] = _number(judged.variance)
    mix, kept = (None, None) if clusters is None else (clusters.cameras, clusters.tracks)
    lines["clusters"] = "-" if clusters is None else f"{clusters.clusters}"
    lines["outliers"] = _number(None if clusters is None else clusters.outlier_share)
    lines["largest cluster"] = _number(None if clusters is None else clusters.largest_share)
    lines["silhouette"] = _number(None if clusters is None else clusters.silhouette)
    lines["cameras per cluster"] = (
        "-" if mix is None else f"{mix.cameras_per_cluster:.2f} ({mix.chance_cameras_per_cluster:.2f} by chance)"
    )
    lines["tracks in one cluster"] = _number(None if kept is None else kept.whole_share)
    lines["two persons in one cluster"] = _number(None if kept is None else kept.confused_share)
    if agreed is not None:
        lines["agreement of both (ARI)"] = f"{agreed.ari:.4f}"
    return lines


def _estimates(found: Separation) -> dict[str, str]:
    """Each figure with its interval."""
    estimates = {name: f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in found.figures.items()}
    return estimates | dict.fromkeys(found.missing, "-")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


AGAINST_HELP = "The active model: adds a verdict whether MODEL may replace it."
REFERENCE_HELP = "Crop store of earlier nights, on which MODEL must not be worse either."
RATIO_HELP = "Refuse MODEL if its latency exceeds OTHER's by this factor; implies --latency."
NAMES_HELP = "Take tracks from Market-1501 file names; uses labels, to evaluate the judge itself."


def judge(
    model: Annotated[str, typer.Option(help=f"Bundle folder, or weights: {WEIGHTS_HELP}")],
    site: SiteOption,
    against: Annotated[str | None, typer.Option(metavar="OTHER", help=AGAINST_HELP)] = None,
    reference: Annotated[Path | None, typer.Option(metavar="STORE", help=REFERENCE_HELP)] = None,
    page: Annotated[Path | None, typer.Option(metavar="F.html", help="Write the verdict as an HTML page.")] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the latency of both models on one batch.")
    ] = False,
    max_ratio: Annotated[float | None, typer.Option("--max-latency-ratio", min=0.01, help=RATIO_HELP)] = None,
    every: Annotated[bool, typer.Option("--all", help="Also use query and gallery crops.")] = False,
    names: Annotated[bool, typer.Option("--tracks-from-names", help=NAMES_HELP)] = False,
    recipe: Annotated[str, typer.Option(help=f"Recipe whose clustering is used: {RECIPES_HELP}.")] = "purify-camera",
    seed: Annotated[int, typer.Option(min=0, help="Seed of pairs and resamples.")] = 0,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Judge a model on a site's crops by tracks and clusters, without labels.

    If the store has tracks held out from adaptation (a gallery without queries), those are used.

    Example: `resight judge --model site-model --site crops/ --against active.bundle --json verdict.json`

    Example: `resight judge --model new --site night/ --reference kept/ --against active.bundle --page verdict.html`
    """
    from resight.training.adaptation.recipe import load_recipe
    from resight.training.features.extract import require_device
    from resight.training.judging.candidate import judge_candidate, open_evaluation_crops
    from resight.training.report.verdict import write_verdict_page

    require_device(device)
    pair_options = {"reference": reference, "page": page, "latency": latency or max_ratio}
    if against is None and any(pair_options.values()):
        alone = ", ".join(f"--{name}" for name, value in pair_options.items() if value)
        raise InputError(f"{alone} compares two models: add --against OTHER, the active model")
    settings = load_recipe(recipe).cluster
    crops = open_evaluation_crops(site, every=every, tracks_from_names=names)
    earlier = None if reference is None else open_evaluation_crops(reference, every=True, tracks_from_names=names)
    candidate = open_model(model, device)
    active = None if against is None else open_model(against, device)
    case = judge_candidate(
        crops, earlier, candidate, active, settings, timed=latency, limit=max_ratio, seed=seed, device=device
    )
    print_judgement(Console(), case, model, against)
    options = {"model": model, "against": against, "site": str(site), "all": every, "recipe": recipe, "seed": seed}
    options["reference"] = None if reference is None else str(reference)
    write_json(json_file, {**case.to_json(), "settings": options})
    if page is not None:
        write_verdict_page(page, case, names=(model, str(against)))
