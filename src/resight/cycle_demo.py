"""Some nights of a simulated site: films, the cycle against a running service, and what search is worth each night.

Each night is filmed (`resight.training.nights`), then `resight cycle once` runs as a process of its own while live
searches go on. mAP is measured through the service before and after, in two collections of the same people: one that
follows the cycle, and one that stays with the first model.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resight import served
from resight.client import Client
from resight.demo import make_room
from resight.live_searches import LiveSearches
from resight.nights_road import FIRST_BUNDLE, ROLLBACK_AFTER, NightRoad, cycle_once, plan, roll_back, site_file

if TYPE_CHECKING:
    from resight.training.crops import CropStore
    from resight.training.nights import Night, SimulatedSite
    from resight.training.nights_page import Step

DAY_S = 86_400.0
PEOPLE, FIRST = "people", "first-model"  # collections: one follows the cycle, one stays where it is
LINEUP = "lineup"
SEARCHES_PER_S = 8.0  # of live callers: a shadow of 30 and a watch take seconds, and training hardly notices


def walk_nights(road: NightRoad) -> dict[str, Any]:
    """Walk through all nights.

    Returns:
        ``steps`` (as `resight.training.nights_page.Step`, without pictures), ``promises`` (text and whether it was
        kept), ``seconds`` in all and ``page`` (path).

    Raises:
        ReIDError: the service or the cycle failed; its message says why.
    """
    from resight.training.lineup import lineup, photograph
    from resight.training.nights import SimulatedSite
    from resight.training.nights_page import write_nights_page

    began = time.monotonic()
    make_room(road.out)
    nights = road.nights or plan(road.scale)
    midnight_s = time.time() // DAY_S * DAY_S
    site = SimulatedSite(
        road.seed,
        first_cameras=road.scale.cameras,
        all_cameras=road.scale.cameras + 1,
        first_s=midnight_s - len(nights) * DAY_S,  # retention counts from today
    )
    people = lineup(site, road.scale.enrolled)
    gallery = photograph(road.out / LINEUP / "enrolled", site, nights[0][0], people, take=0, split="gallery")
    bundle = _first_bundle(road)
    with served.server(bundle, road.out / "gallery", max_top_k=len(gallery), models=road.models) as address:
        road.console.print(f"serving {address}; {len(gallery)} crops of {len(people)} people are enrolled")
        for collection in (PEOPLE, FIRST):
            served.enrol(address, gallery, _silent, collection=collection, lasting=collection == PEOPLE)
        road.entries = _entries(address)
        for night, what in nights:
            folder = road.out / LINEUP / f"night-{night.number}"
            query = photograph(folder, site, night, people, take=1, split="query")
            road.steps.append(_night(road, address, site, night, what, query, gallery))
            if night.number == ROLLBACK_AFTER:
                road.steps.append(_roll_back(road, address, query, gallery))
        kept = _promises(road)
    page = road.out / "nights.html"
    write_nights_page(page, title="Nights of a simulated site", summary=_summary(road), steps=road.steps, promises=kept)
    seconds = round(time.monotonic() - began, 1)
    for text, well in kept:
        road.console.print(f"[{'green' if well else 'bold red'}]{'✓' if well else '✗'}[/] {text}", highlight=False)
    road.console.print(f"{seconds:.0f} s; page: {page}", highlight=False, soft_wrap=True)
    steps = [{name: value for name, value in vars(step).items() if name != "pictures"} for step in road.steps]
    return {"steps": steps, "promises": [list(one) for one in kept], "seconds": seconds, "page": str(page)}


def _silent(done: int) -> None:
    """Progress that nobody is told."""


def _first_bundle(road: NightRoad) -> Path:
    """The model everything starts with."""
    from resight.exporters.export import export_encoder
    from resight.weights import load_weights

    initial = load_weights("builtin")
    road.models.mkdir()
    bundle = export_encoder(
        road.first or initial.encoder,
        road.models / FIRST_BUNDLE,
        name="first",
        training={"initial_weights": dict(initial.source)},
        weights_licence=initial.source["licence"],
    )
    return bundle.path


def _night(
    road: NightRoad, address: str, site: SimulatedSite, night: Night, what: str, query: CropStore, gallery: CropStore
) -> Step:
    """Film it, let the cycle run once, and measure."""
    from resight.training.nights_page import Step, still

    seconds: dict[str, float] = {}
    road.console.rule(f"[bold]night {night.number}[/bold] {what}", align="left")
    with _timed(seconds, "film"), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        folder = road.out / "footage" / f"night-{night.number}"
        films = [pool.submit(site.film, folder, night, camera) for camera in range(night.cameras)]
        reels = [film.result() for film in films]
    road.file.write_text(site_file(road, address, night.cameras))
    with _timed(seconds, "measure"):
        first, before = (_mean_ap(address, query, gallery, collection) for collection in (FIRST, PEOPLE))
    crops = [query.read(row) for row in range(len(query))]
    with LiveSearches(address, PEOPLE, crops, per_s=SEARCHES_PER_S) as live, _timed(seconds, "cycle"):
        told = cycle_once(road, night.number)
    with _timed(seconds, "measure after"):
        after = _mean_ap(address, query, gallery, PEOPLE)
    seconds |= {f"cycle: {stage['stage']}": float(stage["seconds"] or 0.0) for stage in told["stages"]}
    step = Step(
        f"Night {night.number}",
        what,
        str(told["state"]),
        str(told["reason"]),
        first,
        before,
        after,
        _active(address),
        len(_entries(address) & road.entries),
        live.answered,
        len(live.errors),
        seconds,
        f"state/history/run-{told['run']:06d}.html",
        {reel.camera: still(reel.video, reel.frames // 2) for reel in reels},
    )
    _tell(road, step)
    return step


def _roll_back(road: NightRoad, address: str, query: CropStore, gallery: CropStore) -> Step:
    """Take the last promotion back by hand, and measure."""
    from resight.training.nights_page import Step

    road.console.rule("[bold]rollback[/bold]", align="left")
    first, before = (_mean_ap(address, query, gallery, collection) for collection in (FIRST, PEOPLE))
    crops, seconds = [query.read(row) for row in range(len(query))], dict[str, float]()
    with LiveSearches(address, PEOPLE, crops, per_s=SEARCHES_PER_S) as live, _timed(seconds, "rollback"):
        said = roll_back(road)
    step = Step(
        "Rollback",
        "an operator takes the last promotion back with `resight cycle rollback`",
        "rolled_back",
        said,
        first,
        before,
        _mean_ap(address, query, gallery, PEOPLE),
        _active(address),
        len(_entries(address) & road.entries),
        live.answered,
        len(live.errors),
        seconds,
    )
    _tell(road, step)
    return step


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 2)


def _mean_ap(address: str, query: CropStore, gallery: CropStore, collection: str) -> float:
    """MAP in percent, from the service's answers."""
    return round(100 * served.search(address, query, gallery, _silent, collection=collection).score.mAP, 2)


def _active(address: str) -> str:
    """The model that embeds what names none."""
    with Client(address) as client:
        return next(model.model_id for model in client.models() if model.active)


def _entries(address: str) -> frozenset[str]:
    """Ids of everybody in the collection that follows the cycle."""
    with Client(address) as client:
        return frozenset(f"{entry.entry_id} {entry.subject_id}" for entry in client.entries(PEOPLE))


def _tell(road: NightRoad, step: Step) -> None:
    """A line about a step."""
    road.console.print(
        f"{step.state}: {step.reason}\nmAP first model {step.first:.1f}, before {step.before:.1f}, "
        f"after [bold]{step.after:.1f}[/bold]; active {step.active}; {step.entries} entries; "
        f"{step.searches} live searches, {step.failed} failed",
        highlight=False,
    )


def _promises(road: NightRoad) -> list[tuple[str, bool]]:
    """What the nights are to show, and whether they did."""
    first, second, back, third, poisoned = road.steps
    earlier = second.before if second.state == "promoted" else second.first  # mAP on the same queries
    return [
        ("the first night's model is promoted over the built-in one", first.state == "promoted"),
        (
            "through the service, mAP on every night after the first is above the first model's",
            all(step.after > step.first for step in (second, third, poisoned)),
        ),
        (
            "a rollback brings the model before back, and search is what it was",
            back.active != second.active and back.after == earlier,
        ),
        (
            "the next promotion, on the night that changes the look of every camera, takes the rollback's place",
            third.state == "promoted"
            and third.after > third.before
            and third.active not in (second.active, back.active),
        ),
        (
            "the poisoned night is refused, and nothing changes",
            poisoned.state == "refused" and poisoned.active == third.active and poisoned.after == poisoned.before,
        ),
        ("nobody enrolled is lost on the way", all(step.entries == len(road.entries) for step in road.steps)),
        ("no live search fails on the way", all(not step.failed for step in road.steps)),
    ]


def _summary(road: NightRoad) -> str:
    """What the page is about."""
    scale = road.scale
    return (
        f"{scale.visitors} drawn people a night walk past {scale.cameras} cameras, {scale.cameras + 1} from the third "
        f"night on; {scale.enrolled} others are enrolled and searched for. The cycle is told nobody's name: it learns "
        "from the films alone."
    )
