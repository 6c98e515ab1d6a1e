"""`resight evaluate`: how well a model tells a site's known persons apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli_json import JsonOption, write_json
from resight.cli_train import WEIGHTS_HELP, DeviceOption, SiteOption

if TYPE_CHECKING:
    from resight.image import ImageSpec, Pixels
    from resight.training.evaluate import SiteScore
    from resight.training.neighbours import Floats

PAIRS_SHOWN = 8  # cameras of a side up to which the table fits a terminal; with more, the worst pairs are listed
PLOT_HELP = "Draw CMC, open-set curve and camera pairs: F.png, .svg or .pdf."


def evaluate(
    model: Annotated[str, typer.Option(help=f"Bundle folder, or weights: {WEIGHTS_HELP}")],
    site: SiteOption,
    device: DeviceOption = "cpu",
    flip: Annotated[bool, typer.Option("--flip", help="Average each feature with its mirror image's.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank by k-reciprocal neighbours.")] = False,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.png", help=PLOT_HELP)] = None,
) -> None:
    """Measure a model on a site whose persons are known: closed set, open set and camera pairs.

    Example: `resight evaluate --model site-model --site market/ --json figures.json --plot figures.png`
    """
    from resight.training.datasets import open_site
    from resight.training.evaluate import embed_store, evaluation_splits, measure_site
    from resight.training.evaluation import as_json
    from resight.training.plots import check_plot_path, draw_evaluation
    from resight.training.rerank import BALANCE, K1, K2
    from resight.training.run import require_device

    require_device(device)
    if plot is not None:
        check_plot_path(plot)
    opened = open_site(site)
    evaluation_splits(opened)  # refused before a model is loaded
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
    write_json(json_file, {**as_json(score), "settings": settings})
    if plot is not None:
        draw_evaluation(plot, score, title)


def open_model(model: str, device: str) -> tuple[ImageSpec, Callable[[Pixels], Floats]]:
    """Image size and embedding, uint8 (B, H, W, 3) -> float32 (B, D) unit rows, of whatever kind of model this is."""
    from resight.bundle import is_bundle, open_bundle
    from resight.training.evaluate import encoder_embedding
    from resight.training.features import EXTRACTION_BATCH
    from resight.weights import load_weights

    if not is_bundle(Path(model)):
        encoder = load_weights(model).encoder.to(device)
        return encoder.config.image, encoder_embedding(encoder, device)
    from resight.service.runtime import open_runtime

    runtime = open_runtime(open_bundle(Path(model)), max_batch=EXTRACTION_BATCH)
    return runtime.image, runtime.embed


def _closed_set(score: SiteScore, title: str) -> Table:
    """The figures papers print."""
    from resight.training.evaluate import percentages

    table = Table("mAP", "rank-1", "rank-5", "rank-10", "mINP", "valid queries", title=escape(title))
    table.add_row(*(f"{value:.2f}" for value in percentages(score.ranking).values()), str(score.ranking.valid_queries))
    return table


def _open_set(score: SiteScore) -> Table:
    """Threshold and rates at each FPIR."""
    from resight.training.evaluation import OPEN_SET_RANKS, operating_points

    ranks = [f"TPIR, rank {rank}" for rank in OPEN_SET_RANKS]
    table = Table("FPIR", "threshold", *ranks, "mind that", title="open set: searches in two watch lists")
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
    """MAP and rank-1 of every pair, or of the worst where there are many."""
    pairs, names = score.pairs, score.camera_names

    def cell(a: int, b: int) -> str:
        if not pairs.valid_queries[a, b]:
            return "-"
        return f"{100 * pairs.mAP[a, b]:.1f} / {100 * pairs.rank1[a, b]:.1f}"

    queries, galleries = ([escape(names[c]) for c in side] for side in (pairs.query_cameras, pairs.gallery_cameras))
    if len(galleries) <= PAIRS_SHOWN:
        title = "mAP / rank-1 by cameras: rows search, columns are searched"
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
