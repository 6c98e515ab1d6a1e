"""The demo of the cycle: several nights of a simulated site, with live searches on a running service.

Each night is filmed (`resight.training.synthetic.nights`), then `resight cycle once` runs as a subprocess while live
searches continue. mAP is measured through the service before and after, in two collections of the same people: one is
migrated by the cycle, the other stays with the first model.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from resight.client import Client
from resight.demo import harness
from resight.demo.harness import LiveSearches, prepare_folder
from resight.errors import CycleError
from resight.machine import cores, threads

if TYPE_CHECKING:
    from resight.encoder.model import Encoder
    from resight.training.store.crops import CropStore
    from resight.training.synthetic.nights import Night, SimulatedSite
    from resight.training.synthetic.nights_page import DemoStep


EXIT_UNFINISHED = 75  # status of `resight cycle once`: the next call resumes the run
MAX_CYCLE_CALLS = 3  # calls until the run has to be complete
FIRST_BUNDLE = "first"
ROLLBACK_NIGHT = 2  # the night after which an operator rolls back


@dataclass(frozen=True)
class DemoScale:
    """Size of the simulated site and of the training; the defaults take a quarter of an hour on two cores.

    Attributes:
        visitors: people filmed each night.
        enrolled: people enrolled and searched for.
        cameras: on the first night; one more from the third night on.
        epochs: of each stage of training.
        iters: batches per epoch.
        precision: value of `resight export --precision` for each bundle.
    """

    visitors: int = 45
    enrolled: int = 40
    cameras: int = 4
    epochs: int = 1
    iters: int = 32
    precision: str = "auto"


@dataclass
class NightsDemo:
    """Options and results of the demo."""

    out: Path
    scale: DemoScale
    seed: int
    console: Console
    nights: list[tuple[Night, str]] = field(default_factory=list)  # with descriptions; empty = `plan_nights`
    first: Encoder | None = None  # initial model; None = the built-in weights
    steps: list[DemoStep] = field(default_factory=list)
    entries: frozenset[str] = frozenset()  # ids of all enrolled entries

    @property
    def file(self) -> Path:
        """The site's file."""
        return self.out / "site.toml"

    @property
    def models(self) -> Path:
        """The model folder shared by cycle and server."""
        return self.out / "models"


def plan_nights(scale: DemoScale) -> list[tuple[Night, str]]:
    """The nights, each with a description."""
    from resight.training.synthetic.nights import Night

    more = scale.cameras + 1
    return [
        (Night(1, scale.visitors, scale.cameras), "the first night the cycle sees"),
        (Night(2, scale.visitors, scale.cameras), "other people, the same cameras"),
        (Night(3, scale.visitors, more, dusk=True), "a new camera, dusk in the others"),
        (
            Night(4, scale.visitors, more, dusk=True, dead=1, one_person=True),
            "poisoned: one camera is dead, the same person passes all others",
        ),
    ]


def site_toml(demo: NightsDemo, address: str, cameras: int) -> str:
    """The content of site.toml with the cameras installed so far."""
    lines = [
        'name = "street"',
        "[service]",
        f'address = "{address}"',
        f'model_root = "{demo.models.name}"',
        f'bundle = "{demo.models.name}/{FIRST_BUNDLE}"',
    ]
    for number in range(1, cameras + 1):
        films = f"footage/*/cam{number}"
        lines += ["[[camera]]", f'name = "cam{number}"', f'source = "{films}.mp4"']
        lines += [f'detections = "{films}.detections.jsonl"']
    lines += ["[collect]", "min_crops = 100", "hold_out = 0.4"]  # a night has few tracks here
    lines += ["[adapt]", f"epochs = {demo.scale.epochs}", f"iters = {demo.scale.iters}"]
    # All models have the same architecture, so latencies differ only by the load of the machine.
    lines += ["[gate]", "max_latency_ratio = 5.0"]
    lines += ["[export]", f'precision = "{demo.scale.precision}"']
    lines += ["[shadow]", "min_searches = 30", "max_minutes = 1.0", "max_latency_ratio = 5.0"]
    lines += ["[watch]", "minutes = 0.1", "min_searches = 30"]
    lines += ["[schedule]", "nice = 0", "idle_io = false"]  # the user is waiting
    return "\n".join(lines) + "\n"


def run_cycle_once(demo: NightsDemo, night: int) -> dict[str, Any]:
    """Run the cycle until the run ends; returns the output of `resight cycle once --json`.

    Raises:
        CycleError: it wrote no output, or did not end.
    """
    report = demo.out / f"night-{night}.json"
    for _ in range(MAX_CYCLE_CALLS):
        done = run_resight(demo, f"night-{night}", "cycle", "once", demo.file, "--json", report)
        if not report.is_file():
            raise CycleError(f"`resight cycle once` exited with status {done.returncode}: {_tail(done)}")
        if done.returncode != EXIT_UNFINISHED:
            found: dict[str, Any] = json.loads(report.read_text())
            return found
    raise CycleError(f"the cycle of night {night} did not end in {MAX_CYCLE_CALLS} calls: {_tail(done)}")


def run_rollback(demo: NightsDemo) -> str:
    """Roll back the last promotion; returns the output of the command.

    Raises:
        CycleError: the rollback failed.
    """
    done = run_resight(demo, "rollback", "cycle", "rollback", demo.file)
    if done.returncode:
        raise CycleError(f"`resight cycle rollback` exited with status {done.returncode}: {_tail(done)}")
    return "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())


def run_resight(demo: NightsDemo, log: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a subprocess; its output is written to a file in the demo's folder.

    One core is left to the service: a parallel computation takes many times as long when another process occupies one
    of its cores.
    """
    command = [sys.executable, "-m", "resight", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(min(threads(), max(1, cores() - 1)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    (demo.out / f"{log}.log").write_text(done.stdout + done.stderr)
    return done


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of a command's output."""
    return "\n".join((done.stdout + done.stderr).splitlines()[-15:])


DAY_S = 86_400.0
FOLLOWING_COLLECTION = "people"  # migrated by the cycle
FIXED_COLLECTION = "first-model"  # keeps no crops, so it stays with the first model
ENROLMENT_FOLDER = "enrolment"
SEARCHES_PER_S = 8.0  # live searches: 30 for a shadow take seconds, with little effect on training


def run_nights_demo(demo: NightsDemo) -> dict[str, Any]:
    """Run the cycle for all nights.

    Returns:
        ``steps`` (as `resight.training.synthetic.nights_page.DemoStep`, without pictures), ``promises`` (text and
        whether it holds), ``seconds`` in all and ``page`` (path).

    Raises:
        ReIDError: the service or the cycle failed; its message says why.
    """
    from resight.training.synthetic.nights import SimulatedSite, enrolment_set, write_enrolment_crops
    from resight.training.synthetic.nights_page import write_nights_page

    began = time.monotonic()
    prepare_folder(demo.out)
    nights = demo.nights or plan_nights(demo.scale)
    midnight_s = time.time() // DAY_S * DAY_S
    site = SimulatedSite(
        demo.seed,
        first_cameras=demo.scale.cameras,
        all_cameras=demo.scale.cameras + 1,
        first_s=midnight_s - len(nights) * DAY_S,  # retention counts from today
    )
    people = enrolment_set(site, demo.scale.enrolled)
    gallery = write_enrolment_crops(
        demo.out / ENROLMENT_FOLDER / "enrolled", site, nights[0][0], people, take=0, split="gallery"
    )
    bundle = _first_bundle(demo)
    with harness.running_server(bundle, demo.out / "gallery", max_top_k=len(gallery), models=demo.models) as address:
        demo.console.print(f"serving {address}; {len(gallery)} crops of {len(people)} people are enrolled")
        for collection in (FOLLOWING_COLLECTION, FIXED_COLLECTION):
            harness.enrol_gallery(
                address, gallery, _no_progress, collection=collection, keep_crops=collection == FOLLOWING_COLLECTION
            )
        demo.entries = _entry_ids(address)
        for night, description in nights:
            folder = demo.out / ENROLMENT_FOLDER / f"night-{night.number}"
            query = write_enrolment_crops(folder, site, night, people, take=1, split="query")
            demo.steps.append(_run_night(demo, address, site, night, description, query, gallery))
            if night.number == ROLLBACK_NIGHT:
                demo.steps.append(_roll_back(demo, address, query, gallery))
        checks = _checks(demo)
    page = demo.out / "nights.html"
    write_nights_page(
        page, title="Nights of a simulated site", summary=_summary(demo), steps=demo.steps, promises=checks
    )
    seconds = round(time.monotonic() - began, 1)
    for text, passed in checks:
        demo.console.print(f"[{'green' if passed else 'bold red'}]{'✓' if passed else '✗'}[/] {text}", highlight=False)
    demo.console.print(f"{seconds:.0f} s; page: {page}", highlight=False, soft_wrap=True)
    steps = [{name: value for name, value in vars(step).items() if name != "pictures"} for step in demo.steps]
    return {"steps": steps, "promises": [list(one) for one in checks], "seconds": seconds, "page": str(page)}


def _no_progress(done: int) -> None:
    """Ignore progress."""


def _first_bundle(demo: NightsDemo) -> Path:
    """Export the initial model."""
    from resight.encoder.weights import load_weights
    from resight.exporters.export import export_encoder

    initial = load_weights("builtin")
    demo.models.mkdir()
    bundle = export_encoder(
        demo.first or initial.encoder,
        demo.models / FIRST_BUNDLE,
        name="first",
        training={"initial_weights": dict(initial.source)},
        weights_licence=initial.source["licence"],
    )
    return bundle.path


def _run_night(
    demo: NightsDemo,
    address: str,
    site: SimulatedSite,
    night: Night,
    description: str,
    query: CropStore,
    gallery: CropStore,
) -> DemoStep:
    """Film the night, run the cycle once, and measure mAP before and after."""
    from resight.training.synthetic.nights_page import DemoStep, extract_frame

    seconds: dict[str, float] = {}
    demo.console.rule(f"[bold]night {night.number}[/bold] {description}", align="left")
    with _timed(seconds, "film"), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        folder = demo.out / "footage" / f"night-{night.number}"
        pending = [pool.submit(site.record, folder, night, camera) for camera in range(night.cameras)]
        films = [film.result() for film in pending]
    demo.file.write_text(site_toml(demo, address, night.cameras))
    with _timed(seconds, "measure"):
        first, before = (
            _mean_ap(address, query, gallery, collection) for collection in (FIXED_COLLECTION, FOLLOWING_COLLECTION)
        )
    crops = [query.read(row) for row in range(len(query))]
    with LiveSearches(address, FOLLOWING_COLLECTION, crops, per_s=SEARCHES_PER_S) as live, _timed(seconds, "cycle"):
        report = run_cycle_once(demo, night.number)
    with _timed(seconds, "measure after"):
        after = _mean_ap(address, query, gallery, FOLLOWING_COLLECTION)
    seconds |= {f"cycle: {stage['stage']}": float(stage["seconds"] or 0.0) for stage in report["stages"]}
    step = DemoStep(
        f"Night {night.number}",
        description,
        str(report["state"]),
        str(report["reason"]),
        first,
        before,
        after,
        _active_model_id(address),
        len(_entry_ids(address) & demo.entries),
        live.answered,
        len(live.errors),
        seconds,
        f"state/history/run-{report['run']:06d}.html",
        {film.camera: extract_frame(film.video, film.frames // 2) for film in films},
    )
    _print_step(demo, step)
    return step


def _roll_back(demo: NightsDemo, address: str, query: CropStore, gallery: CropStore) -> DemoStep:
    """Roll back the last promotion by hand, and measure mAP."""
    from resight.training.synthetic.nights_page import DemoStep

    demo.console.rule("[bold]rollback[/bold]", align="left")
    first, before = (
        _mean_ap(address, query, gallery, collection) for collection in (FIXED_COLLECTION, FOLLOWING_COLLECTION)
    )
    crops, seconds = [query.read(row) for row in range(len(query))], dict[str, float]()
    with LiveSearches(address, FOLLOWING_COLLECTION, crops, per_s=SEARCHES_PER_S) as live, _timed(seconds, "rollback"):
        output = run_rollback(demo)
    step = DemoStep(
        "Rollback",
        "an operator rolls the last promotion back with `resight cycle rollback`",
        "rolled_back",
        output,
        first,
        before,
        _mean_ap(address, query, gallery, FOLLOWING_COLLECTION),
        _active_model_id(address),
        len(_entry_ids(address) & demo.entries),
        live.answered,
        len(live.errors),
        seconds,
    )
    _print_step(demo, step)
    return step


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 2)


def _mean_ap(address: str, query: CropStore, gallery: CropStore, collection: str) -> float:
    """MAP in percent, from the service's search results."""
    return round(
        100 * harness.search_gallery(address, query, gallery, _no_progress, collection=collection).score.mAP, 2
    )


def _active_model_id(address: str) -> str:
    """The default model of the server."""
    with Client(address) as client:
        return next(model.model_id for model in client.models() if model.active)


def _entry_ids(address: str) -> frozenset[str]:
    """Ids of all entries in the collection migrated by the cycle."""
    with Client(address) as client:
        return frozenset(f"{entry.entry_id} {entry.subject_id}" for entry in client.entries(FOLLOWING_COLLECTION))


def _print_step(demo: NightsDemo, step: DemoStep) -> None:
    """Print the result of a step."""
    demo.console.print(
        f"{step.state}: {step.reason}\nmAP first model {step.first:.1f}, before {step.before:.1f}, "
        f"after [bold]{step.after:.1f}[/bold]; active {step.active}; {step.entries} entries; "
        f"{step.searches} live searches, {step.failed} failed",
        highlight=False,
    )


def _checks(demo: NightsDemo) -> list[tuple[str, bool]]:
    """The claims of the demo, and whether they hold."""
    first, second, back, third, poisoned = demo.steps
    earlier = second.before if second.state == "promoted" else second.first  # mAP on the same queries
    return [
        ("the first night's model is promoted over the built-in one", first.state == "promoted"),
        (
            "through the service, mAP on every night after the first is above the first model's",
            all(step.after > step.first for step in (second, third, poisoned)),
        ),
        (
            "a rollback restores the previous model and its search results",
            back.active != second.active and back.after == earlier,
        ),
        (
            "the next promotion, on the night with other light, replaces the model restored by the rollback",
            third.state == "promoted"
            and third.after > third.before
            and third.active not in (second.active, back.active),
        ),
        (
            "the poisoned night is refused, and nothing changes",
            poisoned.state == "refused" and poisoned.active == third.active and poisoned.after == poisoned.before,
        ),
        ("no enrolled entry is lost", all(step.entries == len(demo.entries) for step in demo.steps)),
        ("no live search fails", all(not step.failed for step in demo.steps)),
    ]


def _summary(demo: NightsDemo) -> str:
    """Summary at the top of the page."""
    scale = demo.scale
    return (
        f"{scale.visitors} synthetic people per night walk past {scale.cameras} cameras, {scale.cameras + 1} from the "
        f"third night on; {scale.enrolled} others are enrolled and searched for. The cycle gets no labels: it trains "
        "on the films alone."
    )
