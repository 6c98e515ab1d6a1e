"""Stages 7 and 9: the candidate on live searches, before promotion beside the active model and after it alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from resight.answers_figures import SearchFigures, Shadow
from resight.client import Client
from resight.cycle.active import read_active
from resight.cycle.alerts import alert
from resight.cycle.outcome import Outcome
from resight.cycle.rollback import roll_back
from resight.cycle.server import connect
from resight.cycle.stages_train import freeze
from resight.cycle.work import Work
from resight.errors import CycleError

log = logging.getLogger(__name__)

FIRST_LOOK_S, LAST_LOOK_S = 0.2, 10.0  # between two looks at the server's figures
MIN_TIMED = 20  # searches timed before a 95th percentile is one of more than the largest value
MINUTE_S = 60.0


def shadow(work: Work) -> Outcome:
    """The candidate answers a share of the live searches too; callers get the active model's answers."""
    wanted, collections = work.site.shadow, _switching(work)
    if not wanted.share or not collections:
        return Outcome(reasons=("no shadow: " + ("share is 0" if collections else "no collection changes its space"),))
    with connect(work.site) as client:
        found = _answered(work, client, collections)
    told = {name: {**asdict(one.figures), "started": one.started.isoformat()} for name, one in found.items()}
    answered = sum(one.figures.answered for one in found.values())
    if answered < wanted.min_searches:
        few = f"{answered} live searches in {wanted.max_minutes:g} minutes, {wanted.min_searches} make a judgement"
        return Outcome("refused" if wanted.required else "done", (few,), told)
    problems = _problems(work, found)
    agreed = _agreement(found)
    well = f"{answered} live searches, the same best hit in {agreed:.1%}"
    return Outcome("refused" if problems else "done", (*problems, well), told, used=bool(problems))


def _switching(work: Work) -> list[str]:
    """The collections that promotion will switch."""
    found = work.came_to("backfill").figures
    return [name for name, was in found["spaces"].items() if was != found["space_id"]]


def _answered(work: Work, client: Client, collections: list[str]) -> dict[str, Shadow]:
    """Wait until enough searches were answered, or for as long as the site's file says; the shadows end here."""
    wanted, pause_s = work.site.shadow, FIRST_LOOK_S
    longest = timedelta(minutes=wanted.max_minutes)
    while True:
        found = {}
        for name in collections:  # asked for again, one goes on; one that a restart of the server ended begins anew
            running = client.start_shadow(
                name, work.model_id, sample=wanted.share, expire_after=longest + timedelta(minutes=5)
            )
            found[name] = running
        enough = sum(one.figures.answered for one in found.values()) >= wanted.min_searches
        first = min(one.started for one in found.values())
        if enough or datetime.now(UTC) - first >= longest:
            return {name: client.stop_shadow(name) for name in collections}
        time.sleep(pause_s)
        pause_s = min(LAST_LOOK_S, 1.5 * pause_s)


def _agreement(found: Mapping[str, Shadow]) -> float:
    """Share of searches whose best hit is the same, over all collections."""
    parts = [(one.figures.answered, one.figures.top1_agreement or 0.0) for one in found.values()]
    return sum(count * share for count, share in parts) / sum(count for count, _ in parts)


def _problems(work: Work, found: Mapping[str, Shadow]) -> list[str]:
    """What speaks against the candidate."""
    wanted, told = work.site.shadow, []
    agreed = _agreement(found)
    if agreed < wanted.min_agreement:
        told.append(f"the best hit is the same in {agreed:.1%} of searches, {wanted.min_agreement:.1%} are asked for")
    for name, one in found.items():
        was, now = one.figures.active, one.figures.candidate
        if min(was.measured, now.measured) < MIN_TIMED or not was.total_p95_ns:
            continue
        ratio = now.total_p95_ns / was.total_p95_ns
        if ratio > wanted.max_latency_ratio:
            told.append(
                f"searches of {name} take {ratio:.2f} times as long (95th percentile {now.total_p95_ns / 1e6:.1f} ms), "
                f"{wanted.max_latency_ratio:g} is allowed"
            )
    return told


@dataclass(frozen=True)
class Seen:
    """A collection's searches in the new space, and in the old one before."""

    name: str
    now: SearchFigures
    before: SearchFigures | None


def watch(work: Work) -> Outcome:
    """Live searches after promotion: kept, told to the operator, or taken back, as the site's file says."""
    wanted = work.site.watch
    at_s = float(work.came_to("promote").figures["at_s"])
    ends_s, pause_s = at_s + wanted.minutes * MINUTE_S, FIRST_LOOK_S
    collections = _switching(work)
    if not wanted.minutes or not collections:
        why = "no watch: " + ("minutes is 0" if collections else "no collection changed its space")
        return Outcome(reasons=(why, *freeze(work)))
    with connect(work.site) as client:
        while True:
            seen = [one for name in collections if (one := _seen(work, client, name, at_s)) is not None]
            problems = [problem for one in seen for problem in _worse(work, one)]
            if problems:
                return _act(work, client, problems, _told(seen))
            if time.time() >= ends_s:
                break
            time.sleep(min(pause_s, max(0.0, ends_s - time.time())))
            pause_s = min(LAST_LOOK_S, 1.5 * pause_s)
    count = sum(one.now.searches for one in seen)
    quiet = f"{count} live searches in {wanted.minutes:g} minutes, nothing to say"
    return Outcome(reasons=(quiet, *freeze(work)), figures=_told(seen))


def _seen(work: Work, client: Client, name: str, at_s: float) -> Seen | None:
    """Figures of one collection; None while nobody searched it."""
    found = work.came_to("backfill").figures
    at = datetime.fromtimestamp(at_s, UTC)
    now = client.search_figures(name, start=at, space_id=str(found["space_id"]))
    before = client.search_figures(name, end=at, space_id=str(found["spaces"][name]))
    return Seen(name, now[0], before[0] if before else None) if now else None


def _worse(work: Work, seen: Seen) -> list[str]:
    """What became worse, once there are searches enough to say so."""
    wanted, told = work.site.watch, []
    if seen.now.searches < wanted.min_searches:
        return []
    share, was = seen.now.unknown_share, None if seen.before is None else seen.before.unknown_share
    if share is not None and was is not None and share - was > wanted.max_unknown_rise:
        told.append(f"{seen.name}: {share:.1%} of searches find nobody, {was:.1%} did before")
    drift = seen.now.drift_index
    if drift is not None and drift > wanted.max_drift:
        told.append(f"{seen.name}: best hits drift, stability index {drift:.2f}, {wanted.max_drift:g} is allowed")
    return told


def _told(seen: list[Seen]) -> dict[str, Any]:
    """Figures for the history."""
    return {
        one.name: {"now": asdict(one.now), "before": None if one.before is None else asdict(one.before)} for one in seen
    }


def _act(work: Work, client: Client, problems: list[str], figures: dict[str, Any]) -> Outcome:
    """Tell the operator, and take the promotion back where the site's file says so."""
    alert(work.layout.alerts, work.number, "; ".join(problems))
    if work.site.watch.action == "alert":
        return Outcome(reasons=(*problems, "kept: watch.action is alert", *freeze(work)), figures=figures)
    active = read_active(work.layout.active)
    if active is None:
        raise CycleError(f"{work.layout.active} is gone: restore it, or roll back with `resight models`")
    if active.run == work.number:  # else a kill came between the way back and its note
        roll_back(work.site, work.layout, client, active)
    return Outcome("rolled_back", tuple(problems), figures)
