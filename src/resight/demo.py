"""The road from unlabelled crops to search results, step by step.

site -> bundle of the initial model -> its score, through a service -> adapt -> bundle -> its score,
through a service -> report. A step that fails ends the walk with the reason.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from resight.errors import SiteError

if TYPE_CHECKING:
    from resight.bundle import Bundle
    from resight.checkpoint import Checkpoint
    from resight.served import Served
    from resight.training.crops import CropStore
    from resight.training.datasets import Site
    from resight.training.neighbours import Floats
    from resight.weights import InitialWeights

DRAWN_EPOCHS, DRAWN_ITERS = 4, 64  # of each stage on drawn people: 2,400 easy crops, and a newcomer who waits
MARK = ".resight-demo"  # what is in a folder with this file, a later demo may remove


@dataclass
class Road:
    """What to walk with; ``seconds`` fills up on the way."""

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
        """Name a step, and time it."""
        self.console.rule(f"[bold]{name}[/bold]", align="left")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; yields the function that moves it on."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)


def walk(road: Road) -> dict[str, Any]:
    """Walk the whole road.

    Returns:
        ``initial`` and ``adapted`` (figures in percent, from the services' answers), ``seconds`` per step,
        ``report`` (path).

    Raises:
        ReIDError: a step failed; its message says why.
    """
    from resight.training.crops import usable_crops
    from resight.training.evaluate import percentages
    from resight.training.report import write_report
    from resight.training.run import require_device
    from resight.training.story import Outcome, tell
    from resight.weights import load_weights

    require_device(road.device)
    initial = load_weights(road.init)  # before an earlier demo's folder gives way
    with road.step("site"):
        site = _open_site(road)
    before = _measure_initial(road, site, initial)
    with road.step("adapt"):
        store = usable_crops(site.train)
        checkpoint = _adapt(road, store, initial)
    with road.step("export"):
        bundle = _export(road)
    after = _serve_and_search(road, site, bundle, "adapted")
    figures = {"initial": percentages(before.score), "adapted": percentages(after.score)}
    _show(road, figures)
    with road.step("report"):
        report = road.out / "report.html"
        features = _embed(road, store, checkpoint)
        log = road.out / "log"
        outcome = Outcome(site, store, checkpoint, features, bundle, before, after, log, figures, road.seconds)
        write_report(report, tell(outcome))
    road.console.print(f"report: {report}")
    return {**figures, "seconds": road.seconds, "report": str(report)}


def _make_room(road: Road) -> None:
    """An empty folder of the demo's own.

    Raises:
        SiteError: there is a folder that no demo made, or one that holds what this demo starts from.
    """
    for given in (road.site, Path(road.init)):
        if given is not None and given.resolve().is_relative_to(road.out.resolve()) and given.exists():
            raise SiteError(f"{given} lies in {road.out}, which this demo empties first: choose another --out")
    make_room(road.out)


def make_room(out: Path) -> None:
    """An empty folder for a demo; what an earlier demo left there goes.

    Raises:
        SiteError: there is a folder that no demo made.
    """
    if out.exists() and not (out / MARK).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise SiteError(f"{out} exists and no demo made it: choose another --out, or remove it")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("made by `resight demo`; the next one removes it\n")


def _open_site(road: Road) -> Site:
    """The given site, or synthetic people seen by cameras the built-in weights do not know, and room for results."""
    from resight.training.datasets import open_site
    from resight.training.evaluate import evaluation_splits
    from resight.training.synthetic import demo_site

    if road.site is None:
        _make_room(road)
        site = demo_site(road.out / "site", seed=road.seed)
    else:
        site = open_site(road.site)
        evaluation_splits(site)
        _make_room(road)  # last: what cannot be walked removes nothing
    road.console.print(
        f"{site.name}: {len(site.train)} unlabelled crops from {len(site.train.camera_names)} cameras; "
        f"{len(site.query or ())} queries, {len(site.gallery or ())} gallery crops of other people to measure with"
    )
    return site


def _measure_initial(road: Road, site: Site, initial: InitialWeights) -> Served:
    """What the model does before it knows the site."""
    from resight.exporters.export import export_encoder

    with road.step("export the initial model"):
        bundle = export_encoder(
            initial.encoder,
            road.out / "initial.bundle",
            name="initial",
            training={"initial_weights": dict(initial.source)},
            weights_licence=initial.source["licence"],
        )
    return _serve_and_search(road, site, bundle, "initial")


def _adapt(road: Road, store: CropStore, initial: InitialWeights) -> Checkpoint:
    """Teacher and student, from the site's unlabelled crops alone."""
    from resight.training.adapt import Adaptation, adapt
    from resight.training.recipe import load_recipe
    from resight.training.run import Run
    from resight.training.runlog import RunLog

    epochs, iters = (DRAWN_EPOCHS, DRAWN_ITERS) if road.site is None else (None, None)
    recipe = load_recipe("purify-camera").with_schedule(epochs=road.epochs or epochs, iters=road.iters or iters)
    with RunLog(road.out / "log", console=road.console) as runlog:
        run = Run(store, recipe, road.seed, road.device, runlog)
        return adapt(Adaptation(run, initial, road.out / "checkpoint"))


def _export(road: Road) -> Bundle:
    """The student's global head as a bundle."""
    from resight.exporters.export import export_checkpoint

    bundle = export_checkpoint(road.out / "checkpoint", road.out / "adapted.bundle", name="adapted")
    worst = bundle.manifest.artefacts[0].min_cosine
    road.console.print(f"exported and verified: min cosine to the trained model {worst:.7f}")
    return bundle


def _serve_and_search(road: Road, site: Site, bundle: Bundle, name: str) -> Served:
    """Start a server of its own process, enrol the gallery, search with every query, stop the server."""
    from resight import served
    from resight.training.evaluate import evaluation_splits

    query, gallery = evaluation_splits(site)
    top_k = min(len(gallery), served.MAX_TOP_K)
    with road.step(f"serve, enrol and search ({name} model)"):
        with served.server(bundle.path, road.out / f"gallery-{name}", max_top_k=top_k) as address:
            road.console.print(f"serving {address}")
            with road.bar("enrol", len(gallery)) as advance:
                served.enrol(address, gallery, advance)
            with road.bar("search", len(query)) as advance:
                return served.search(address, query, gallery, advance)


def _embed(road: Road, store: CropStore, checkpoint: Checkpoint) -> Floats:
    """Features of the crops adapted to, for the report's map and clusters."""
    from resight.training.features import extract

    with road.bar("features", len(store)) as advance:
        encoder = checkpoint.encoder.to(road.device)
        return extract(encoder, store, device=road.device, local=False, progress=advance)[0]


def _show(road: Road, figures: dict[str, dict[str, float]]) -> None:
    """Before and after, as a table."""
    table = Table("model", "mAP", "rank-1", "rank-5", "rank-10", title="through the service, in percent")
    for name, scores in figures.items():
        table.add_row(name, *(f"{scores[key]:.1f}" for key in ("mAP", "rank1", "rank5", "rank10")))
    gain = figures["adapted"]["mAP"] - figures["initial"]["mAP"]
    road.console.print(table)
    road.console.print(f"adaptation without a label: [bold]{gain:+.1f} mAP[/bold]")
