"""The demo of adaptation: from unlabelled crops to search results, step by step.

Steps: open the site, export the initial model and score it through a service, adapt, export the adapted model and
score it through a service, write the report. A failed step ends the demo with its error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from resight.demo.harness import prepare_folder
from resight.errors import SiteError

if TYPE_CHECKING:
    from resight.arrays import Floats
    from resight.bundle.bundle import Bundle
    from resight.demo.harness import ServedResult
    from resight.encoder.checkpoint import Checkpoint
    from resight.encoder.weights import InitialWeights
    from resight.training.store.crops import CropStore
    from resight.training.store.datasets import Site

DRAWN_EPOCHS, DRAWN_ITERS = 4, 64  # of each stage on the 2,400 synthetic crops, where a few epochs are enough


PICTURE = "ranked-lists.jpg"


@dataclass
class AdaptationDemo:
    """Options of the demo; ``seconds`` receives the duration of each step."""

    site: Path | None
    init: str
    out: Path
    epochs: int | None
    iters: int | None
    seed: int
    device: str
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Print the name of a step, and measure its time."""
        self.console.rule(f"[bold]{name}[/bold]", align="left")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; yields the function that advances it."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda done: progress.advance(task, done)


def run_demo(demo: AdaptationDemo) -> dict[str, Any]:
    """Run all steps of the demo.

    Returns:
        ``initial`` and ``adapted`` (scores in percent, from the results of the services), ``seconds`` per step,
        ``report`` (path).

    Raises:
        ReIDError: a step failed; its message says why.
    """
    from resight.encoder.weights import load_weights
    from resight.training.evaluation.evaluate import percentages
    from resight.training.features.extract import require_device
    from resight.training.report.adaptation import DemoResult, demo_report, write_report
    from resight.training.report.ranked_lists import draw_ranked_lists
    from resight.training.store.crops import usable_crops

    require_device(demo.device)
    initial = load_weights(demo.init)  # before an earlier demo's folder is deleted
    with demo.step("site"):
        site = _open_site(demo)
    before = _measure_initial(demo, site, initial)
    with demo.step("adapt"):
        store = usable_crops(site.train)
        checkpoint = _adapt(demo, store, initial)
    with demo.step("export"):
        bundle = _export(demo)
    after = _serve_and_search(demo, site, bundle, "adapted")
    figures = {"initial": percentages(before.score), "adapted": percentages(after.score)}
    _print_scores(demo, figures)
    with demo.step("report"):
        report = demo.out / "report.html"
        features = _extract_features(demo, store, checkpoint)
        log = demo.out / "log"
        outcome = DemoResult(site, store, checkpoint, features, bundle, before, after, log, figures, demo.seconds)
        page = demo_report(outcome)
        write_report(report, page)
        if page.ranked:
            draw_ranked_lists(demo.out / PICTURE, page.ranked)
    demo.console.print(f"report: {report}; picture: {demo.out / PICTURE}")
    return {**figures, "seconds": demo.seconds, "report": str(report)}


def _prepare_folder(demo: AdaptationDemo) -> None:
    """Create the empty output folder.

    Raises:
        SiteError: the folder was not created by a demo, or contains the site or the weights to start from.
    """
    for source in (demo.site, Path(demo.init)):
        if source is not None and source.resolve().is_relative_to(demo.out.resolve()) and source.exists():
            raise SiteError(f"{source} is in {demo.out}, which this demo empties first: choose another --out")
    prepare_folder(demo.out)


def _open_site(demo: AdaptationDemo) -> Site:
    """Open the given site, or draw synthetic people in cameras unknown to the built-in weights; creates the folder."""
    from resight.training.evaluation.evaluate import evaluation_splits
    from resight.training.store.datasets import open_site
    from resight.training.synthetic.site import demo_site

    if demo.site is None:
        _prepare_folder(demo)
        site = demo_site(demo.out / "site", seed=demo.seed)
    else:
        site = open_site(demo.site)
        evaluation_splits(site)
        _prepare_folder(demo)  # last, so that an invalid site deletes nothing
    demo.console.print(
        f"{site.name}: {len(site.train)} unlabelled crops from {len(site.train.camera_names)} cameras; "
        f"{len(site.query or ())} queries, {len(site.gallery or ())} gallery crops of other people for evaluation"
    )
    return site


def _measure_initial(demo: AdaptationDemo, site: Site, initial: InitialWeights) -> ServedResult:
    """Score of the initial model, before adaptation."""
    from resight.exporters.export import export_encoder

    with demo.step("export the initial model"):
        bundle = export_encoder(
            initial.encoder,
            demo.out / "initial.bundle",
            name="initial",
            training={"initial_weights": dict(initial.source)},
            weights_licence=initial.source["licence"],
        )
    return _serve_and_search(demo, site, bundle, "initial")


def _adapt(demo: AdaptationDemo, store: CropStore, initial: InitialWeights) -> Checkpoint:
    """Adapt teacher and student to the site's unlabelled crops."""
    from resight.training.adaptation.adapt import adapt
    from resight.training.adaptation.checkpoints import Adaptation
    from resight.training.adaptation.recipe import load_recipe
    from resight.training.adaptation.run import RunLog, TrainingRun

    epochs, iters = (DRAWN_EPOCHS, DRAWN_ITERS) if demo.site is None else (None, None)
    recipe = load_recipe("purify-camera").with_schedule(epochs=demo.epochs or epochs, iters=demo.iters or iters)
    with RunLog(demo.out / "log", console=demo.console) as runlog:
        run = TrainingRun(store, recipe, demo.seed, demo.device, runlog)
        return adapt(Adaptation(run, initial, demo.out / "checkpoint"))


def _export(demo: AdaptationDemo) -> Bundle:
    """Export the student's global head as a bundle."""
    from resight.exporters.export import export_checkpoint

    bundle = export_checkpoint(demo.out / "checkpoint", demo.out / "adapted.bundle", name="adapted")
    worst = bundle.manifest.artefacts[0].min_cosine
    demo.console.print(f"exported and verified: min cosine to the trained model {worst:.7f}")
    return bundle


def _serve_and_search(demo: AdaptationDemo, site: Site, bundle: Bundle, name: str) -> ServedResult:
    """Start a server process, enrol the gallery, search with every query, stop the server."""
    from resight.demo import harness
    from resight.training.evaluation.evaluate import evaluation_splits

    query, gallery = evaluation_splits(site)
    top_k = min(len(gallery), harness.MAX_TOP_K)
    with demo.step(f"serve, enrol and search ({name} model)"):
        with harness.running_server(bundle.path, demo.out / f"gallery-{name}", max_top_k=top_k) as address:
            demo.console.print(f"serving {address}")
            with demo.bar("enrol", len(gallery)) as advance:
                harness.enrol_gallery(address, gallery, advance)
            with demo.bar("search", len(query)) as advance:
                return harness.search_gallery(address, query, gallery, advance)


def _extract_features(demo: AdaptationDemo, store: CropStore, checkpoint: Checkpoint) -> Floats:
    """Features of the training crops, for the report's map and clusters."""
    from resight.training.features.extract import extract_features

    with demo.bar("features", len(store)) as advance:
        encoder = checkpoint.encoder.to(demo.device)
        return extract_features(encoder, store, device=demo.device, local=False, progress=advance)[0]


def _print_scores(demo: AdaptationDemo, figures: dict[str, dict[str, float]]) -> None:
    """Print the scores before and after adaptation as a table."""
    table = Table("model", "mAP", "rank-1", "rank-5", "rank-10", title="through the service, in percent")
    for name, scores in figures.items():
        table.add_row(name, *(f"{scores[key]:.1f}" for key in ("mAP", "rank1", "rank5", "rank10")))
    gain = figures["adapted"]["mAP"] - figures["initial"]["mAP"]
    demo.console.print(table)
    demo.console.print(f"adaptation without labels: [bold]{gain:+.1f} mAP[/bold]")
