"""The nine stages of a run, each a function of a `StageContext`, and how a stage runs a command of `resight`.

1-5 (ingest, collect, adapt, judge, export): footage becomes crops, crops become a candidate model, the candidate is
judged and exported as a bundle. 6-8 (backfill, shadow, promote): the server loads the candidate, embeds the collections
again, compares it with the active model on live searches, and switches to it. 9 (watch): live searches after promotion.

Every stage can be repeated after a kill: ingest skips footage it has read, adapt resumes after its last epoch, a
migration continues on the server, a switch that was already made is detected; the others write whole files at once.
"""

from __future__ import annotations

import glob
import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from resight.client import Client
from resight.client.responses import SearchStatistics, Shadow
from resight.cycle.history import alert
from resight.cycle.rollback import roll_back, switch_back
from resight.cycle.server import (
    TRANSIENT_ERRORS,
    access_options,
    active_model_info,
    connect,
    find_active_model,
    wait_for_operation,
)
from resight.cycle.site import CameraSection, SiteFile
from resight.cycle.state_folder import (
    ActiveModel,
    RunFolder,
    StageOutcome,
    StateFolder,
    read_active,
    read_outcome,
    write_active,
)
from resight.errors import (
    BundleError,
    ConflictError,
    CycleError,
    MigrationError,
    ReIDError,
    SiteError,
    TrainingError,
    UnavailableError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageContext:
    """One stage of one run.

    Attributes:
        site: its file as read when the stage began.
        number: of the run.
        since_s: capture time up to which crops were used by earlier runs.
        run_command: runs a command line of `resight` in this process; returns its exit status.
    """

    site: SiteFile
    number: int
    since_s: float
    run_command: Callable[[list[str]], int | None]

    @property
    def layout(self) -> StateFolder:
        """The state folder."""
        return StateFolder(self.site.state)

    @property
    def folder(self) -> RunFolder:
        """The run's own folder."""
        return self.layout.run(self.number)

    @property
    def model_id(self) -> str:
        """The candidate's name on the server."""
        return self.site.model_id(self.number)

    @property
    def bundle(self) -> Path:
        """The candidate's bundle in the folder that is shared with the server."""
        return self.site.service.model_root / self.model_id

    def outcome_of(self, stage: str) -> StageOutcome:
        """The outcome of an earlier stage of this run."""
        outcome = read_outcome(self.folder.result(stage))
        if outcome is None:
            raise CycleError(f"{self.folder.result(stage)} is missing: restore it, or delete the run from the database")
        return outcome

    def baseline(self) -> ActiveModel:
        """The model that was active when the run began to adapt."""
        active = read_active(self.folder.baseline)
        if active is None:
            raise CycleError(f"{self.folder.baseline} is missing: restore it, or delete the run from the database")
        return active

    def command(self, name: str, *arguments: object, figures: str = "") -> dict[str, Any]:
        """Run a command of `resight` in this process.

        Args:
            name: of the command; the options for access to the server are put before it.
            *arguments: of the command; ``--json`` is added.
            figures: name of the file for its figures; the command's name by default.

        Returns:
            The figures it wrote with ``--json``.

        Raises:
            ReIDError: the error of the command.
            CycleError: its exit status was not 0.
        """
        file = self.folder.figures_file(figures or name)
        file.unlink(missing_ok=True)
        words = [*access_options(self.site), name, *map(str, arguments), "--json", str(file)]
        log.info("resight %s", shlex.join(words))
        status = self.run_command(words)
        if status:
            raise CycleError(f"`resight {name}` exited with status {status}: see the log of this stage")
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def ingest(context: StageContext) -> StageOutcome:
    """Add crops from every camera's footage and from the configured collections to the site's crop store.

    A failed source does not stop the others; the run fails only if all sources fail.
    """
    results: dict[str, object] = {}
    failed: dict[str, ReIDError] = {}
    for name, arguments in _ingest_arguments(context).items():
        try:
            results[name] = (
                context.command("ingest", *arguments, figures=f"ingest-{name}") if arguments else "nothing there"
            )
        except ReIDError as error:
            log.error("%s: %s", name, error)
            failed[name] = error
    if failed and not results:
        raise next(iter(failed.values()))
    texts = {name: str(one) for name, one in failed.items()}
    return StageOutcome(reasons=tuple(map(": ".join, texts.items())), figures={"sources": results, "failed": texts})


def _ingest_arguments(context: StageContext) -> dict[str, list[object]]:
    """Arguments of `resight ingest` for every camera and collection; an empty list for a camera without files."""
    into = ("--into", context.layout.crops)
    found: dict[str, list[object]] = {}
    for camera in context.site.camera:
        files = _camera_files(camera)
        found[camera.name] = (
            [*files, *into, "--device", context.site.adapt.device, *_camera_options(camera)] if files else []
        )
    for gallery in context.site.gallery:
        name = gallery.collection
        found[f"gallery-{name}"] = ["--from-gallery", name, "--server", context.site.service.address, *into]
    return found


def _camera_files(camera: CameraSection) -> list[str]:
    """The files of a camera, sorted by name; a stream's address is returned unchanged."""
    return [camera.source] if "://" in camera.source else sorted(glob.glob(camera.source, recursive=True))


def _camera_options(camera: CameraSection) -> list[object]:
    """Options of `resight ingest` for a camera."""
    options: list[object] = ["--camera", camera.name, "--fps", camera.fps, "--tracks", camera.tracks]
    options += ["--crops-per-track", camera.crops_per_track, "--min-height", camera.min_height]
    if camera.start is not None:
        options += ["--start", camera.start.isoformat()]
    if "://" in camera.source:
        options += ["--duration", camera.seconds]
    if camera.detections is None:
        weights = [] if camera.detector_weights is None else ["--detector-weights", camera.detector_weights]
        return [*options, "--detector", camera.detector, *weights]
    return options + [word for file in sorted(glob.glob(camera.detections)) for word in ("--detections", file)]


def collect(context: StageContext) -> StageOutcome:
    """Select the crops of this run: skipped if too few are new, refused if unsound. Expired crops are deleted."""
    settings = context.site.collect
    found = context.command(
        "collect",
        *("--from", context.layout.crops, "--into", context.folder.site, "--since", context.since_s),
        *(
            "--reference",
            context.layout.reference,
            "--min-crops",
            settings.min_crops,
            "--max-crops",
            settings.max_crops,
        ),
        *("--replay", settings.replay, "--hold-out", settings.hold_out, "--seed", context.site.adapt.seed),
        *("--retention", settings.retention_days, "--purge"),
    )
    reasons = tuple(found["reasons"])
    if found["outcome"] == "ready":
        return StageOutcome(reasons=reasons, figures=found)
    if found["outcome"] == "skipped":
        return StageOutcome("skipped", reasons, found)
    return StageOutcome("refused", reasons, found, used=True)


def extend_reference(context: StageContext) -> list[str]:
    """Add the crops held out by a promoted run to the judge's reference; returns the error, if any, as a reason."""
    settings = context.site.collect
    if not context.folder.site.exists():
        return ["reference not extended: the run's crops no longer exist"]
    try:
        context.command(
            "collect",
            *("--freeze", context.folder.site, "--reference", context.layout.reference),
            *("--most", settings.max_reference, "--retention", settings.retention_days, "--purge"),
            figures="freeze",
        )
    except (ReIDError, OSError) as error:
        log.warning("%s", error)
        return [f"reference not extended: {error}"]
    return []


def adapt(context: StageContext) -> StageOutcome:
    """Train the candidate, from the active model's checkpoint or from the base weights."""
    if not context.folder.baseline.exists():
        with connect(context.site) as client:
            write_active(context.folder.baseline, find_active_model(context.site, context.layout, client))
    settings, active = context.site.adapt, context.baseline()
    start = active.checkpoint if settings.start_from == "active" and active.checkpoint else settings.base
    optional = {"--epochs": settings.epochs, "--iters": settings.iters}
    more = [word for name, value in optional.items() if value is not None for word in (name, value)]
    more += [word for change in settings.set for word in ("--set", change)]
    try:
        result = context.command(
            "adapt",
            *("--site", context.folder.site, "--init", start, "--recipe", settings.recipe),
            *(
                "--out",
                context.folder.checkpoint,
                "--seed",
                settings.seed,
                "--device",
                settings.device,
                "--resume",
                *more,
            ),
        )
    except (TrainingError, SiteError) as error:
        return StageOutcome("refused", (f"no model can be trained on these crops: {error}",), used=True)
    return StageOutcome(figures={"started_from": start, "active": active.model_id, "last_epoch": result["last_epoch"]})


def judge(context: StageContext) -> StageOutcome:
    """Compare the candidate with the active model, without labels; both as bundles, so that latencies compare."""
    bundle = context.folder.path / "judged.bundle"
    reference = ["--reference", context.layout.reference] if context.layout.reference.is_dir() else []
    try:
        name = f"{context.model_id}-judged"[:63]
        context.command(
            "export", context.folder.checkpoint, "--out", bundle, "--name", name, "--replace", figures="export-judged"
        )
        result = context.command(
            "judge",
            *("--model", bundle, "--against", context.baseline().bundle, "--site", context.folder.site, *reference),
            *("--max-latency-ratio", context.site.gate.max_latency_ratio, "--page", context.folder.page),
        )
    except (TrainingError, SiteError, BundleError) as error:
        return StageOutcome("refused", (f"the candidate cannot be judged on these crops: {error}",), used=True)
    verdict = result["verdict"]
    decision, reasons = verdict["decision"], tuple(verdict["reasons"])
    if decision == "promote" or (decision == "undecided" and context.site.gate.allow_undecided):
        return StageOutcome(reasons=(f"{decision} by {verdict['evidence']}", *reasons), figures=verdict)
    # After `refuse` the crops count as used; after `undecided` they count again, together with more new ones.
    return StageOutcome(
        "refused", (f"{decision} by {verdict['evidence']}", *reasons), verdict, used=decision == "refuse"
    )


def export(context: StageContext) -> StageOutcome:
    """Export the candidate's bundle into the model folder that is shared with the server."""
    root = context.site.service.model_root
    if not root.is_dir():
        raise UnavailableError(f"model folder {root} does not exist: mount it, or correct [service] model_root")
    result = context.command(
        "export",
        *(context.folder.checkpoint, "--out", context.bundle, "--name", context.model_id, "--replace"),
        *("--precision", context.site.export.precision, "--site", context.folder.site),
        *("--report", context.folder.path / "export.html"),
    )
    return StageOutcome(
        figures={"bundle": str(context.bundle), "space_id": result["space_id"], "left_out": result["left_out"]}
    )


def backfill(context: StageContext) -> StageOutcome:
    """Embed every migrated collection with the candidate; searches still use the old space."""
    dropping = context.site.migrate.missing_crops == "drop"
    with connect(context.site) as client:
        loaded = wait_for_operation(client, client.load_model(context.model_id))
        space_id = loaded.result["space_id"]
        spaces: dict[str, str] = {}
        results: dict[str, object] = {}
        for name in _collections_to_migrate(context, client):
            before = client.collection(name)
            spaces[name] = before.space_id
            if before.space_id == space_id:  # unchanged weights give the same space
                continue
            try:
                done = wait_for_operation(client, client.migrate(name, context.model_id, drop_missing=dropping))
            except MigrationError as error:
                return StageOutcome("refused", (f"collection {name}: {error}",), used=True)
            results[name] = {"entries": done.total, "embedded": done.succeeded, **done.result}
            log.info("collection %s: %d of %d entries embedded", name, done.succeeded, done.total)
    return StageOutcome(figures={"space_id": space_id, "spaces": spaces, "collections": results})


def _collections_to_migrate(context: StageContext, client: Client) -> list[str]:
    """The collections that are migrated to a new model."""
    configured = context.site.migrate.collections
    return list(configured) or [one.name for one in client.collections() if one.keep_crops]


def promote(context: StageContext) -> StageOutcome:
    """Activate the candidate's space in the collections, then make it the default model; both by compare-and-swap."""
    found, before = context.outcome_of("backfill").figures, context.baseline()
    space_id, old_spaces = str(found["space_id"]), dict(found["spaces"])
    dropping = context.site.migrate.missing_crops == "drop"
    with connect(context.site) as client:
        wait_for_operation(client, client.load_model(context.model_id))  # the server may have been restarted since
        _check_unchanged(context, client, before, old_spaces, space_id)
        entries = {name: client.collection(name).entry_count for name in old_spaces}
        spaces = {name: (old, space_id) for name, old in old_spaces.items() if old != space_id}
        candidate = ActiveModel(
            context.model_id, str(context.bundle), str(context.folder.checkpoint), context.number, spaces, before
        )
        try:
            for name, (old, new) in spaces.items():
                if client.collection(name).space_id != new:
                    client.activate_space(name, new, expected=old, allow_incomplete=dropping)
            if active_model_info(client).model_id != context.model_id:
                client.activate_model(context.model_id, expected=before.model_id)
        except TRANSIENT_ERRORS:  # the retry continues
            raise
        except ReIDError:
            switch_back(client, candidate)
            raise
    write_active(context.layout.active, candidate)
    log.info("%s is active instead of %s", context.model_id, before.model_id)
    return StageOutcome(
        figures={"active": context.model_id, "previous": before.model_id, "entries": entries, "at_s": time.time()}
    )


def _check_unchanged(
    context: StageContext, client: Client, before: ActiveModel, old_spaces: Mapping[str, str], space_id: str
) -> None:
    """Refuse to switch if models or spaces were switched by someone else since the run began.

    Raises:
        ConflictError: another model is active, or a collection is searched in another space.
    """
    now = active_model_info(client).model_id
    if now not in (before.model_id, context.model_id):
        raise ConflictError(
            f"model {now} is active, but run {context.number} began with {before.model_id}: it was switched by "
            "someone else; the next run starts from the active model"
        )
    for name, old in old_spaces.items():
        found = client.collection(name).space_id
        if found not in (old, space_id):
            raise ConflictError(
                f"collection {name} uses space {found}, but run {context.number} began with {old}: it was switched by "
                "someone else; the next run starts from the active space"
            )


MIN_POLL_S, MAX_POLL_S = 0.2, 10.0  # interval of polling the server's figures
MIN_TIMED_SEARCHES = 20  # with fewer, the 95th percentile is just the maximum
MINUTE_S = 60.0


def shadow(context: StageContext) -> StageOutcome:
    """Run the candidate on a share of the live searches; callers still get the active model's results."""
    settings, collections = context.site.shadow, _collections_to_switch(context)
    if not settings.share or not collections:
        return StageOutcome(
            reasons=("no shadow: " + ("share is 0" if collections else "no collection changes its space"),)
        )
    with connect(context.site) as client:
        found = _run_shadows(context, client, collections)
    figures = {name: {**asdict(one.figures), "started": one.started.isoformat()} for name, one in found.items()}
    answered = sum(one.figures.answered for one in found.values())
    if answered < settings.min_searches:
        few = f"{answered} live searches in {settings.max_minutes:g} minutes, at least {settings.min_searches} required"
        return StageOutcome("refused" if settings.required else "done", (few,), figures)
    problems = _shadow_problems(context, found)
    agreed = _top1_agreement(found)
    summary = f"{answered} live searches, the same best hit in {agreed:.1%}"
    return StageOutcome("refused" if problems else "done", (*problems, summary), figures, used=bool(problems))


def _collections_to_switch(context: StageContext) -> list[str]:
    """The collections that promotion will switch."""
    found = context.outcome_of("backfill").figures
    return [name for name, old in found["spaces"].items() if old != found["space_id"]]


def _run_shadows(context: StageContext, client: Client, collections: list[str]) -> dict[str, Shadow]:
    """Run shadows until enough searches were answered or `shadow.max_minutes` have passed, then stop them."""
    settings, pause_s = context.site.shadow, MIN_POLL_S
    longest = timedelta(minutes=settings.max_minutes)
    while True:
        found = {}
        for name in collections:  # repeated: continues a running shadow, restarts one lost by a server restart
            running = client.start_shadow(
                name, context.model_id, sample=settings.share, expire_after=longest + timedelta(minutes=5)
            )
            found[name] = running
        enough = sum(one.figures.answered for one in found.values()) >= settings.min_searches
        first = min(one.started for one in found.values())
        if enough or datetime.now(UTC) - first >= longest:
            return {name: client.stop_shadow(name) for name in collections}
        time.sleep(pause_s)
        pause_s = min(MAX_POLL_S, 1.5 * pause_s)


def _top1_agreement(found: Mapping[str, Shadow]) -> float:
    """Share of searches whose best hit is the same, over all collections."""
    parts = [(one.figures.answered, one.figures.top1_agreement or 0.0) for one in found.values()]
    return sum(count * share for count, share in parts) / sum(count for count, _ in parts)


def _shadow_problems(context: StageContext, found: Mapping[str, Shadow]) -> list[str]:
    """Reasons to refuse the candidate."""
    settings = context.site.shadow
    problems: list[str] = []
    agreed = _top1_agreement(found)
    if agreed < settings.min_agreement:
        problems.append(
            f"the best hit is the same in {agreed:.1%} of searches, at least {settings.min_agreement:.1%} required"
        )
    for name, one in found.items():
        active, candidate = one.figures.active, one.figures.candidate
        if min(active.measured, candidate.measured) < MIN_TIMED_SEARCHES or not active.total_p95_ns:
            continue
        ratio = candidate.total_p95_ns / active.total_p95_ns
        if ratio > settings.max_latency_ratio:
            problems.append(
                f"searches of {name} take {ratio:.2f} times as long (95th percentile "
                f"{candidate.total_p95_ns / 1e6:.1f} ms), at most {settings.max_latency_ratio:g} allowed"
            )
    return problems


@dataclass(frozen=True)
class WatchedCollection:
    """Search figures of a collection in the new space, and in the old space before the promotion."""

    name: str
    now: SearchStatistics
    before: SearchStatistics | None


def watch(context: StageContext) -> StageOutcome:
    """Monitor live searches after the promotion; on a regression, alert or roll back as `watch.action` says."""
    settings = context.site.watch
    at_s = float(context.outcome_of("promote").figures["at_s"])
    ends_s, pause_s = at_s + settings.minutes * MINUTE_S, MIN_POLL_S
    collections = _collections_to_switch(context)
    if not settings.minutes or not collections:
        why = "no watch: " + ("minutes is 0" if collections else "no collection changed its space")
        return StageOutcome(reasons=(why, *extend_reference(context)))
    with connect(context.site) as client:
        while True:
            seen = [one for name in collections if (one := _search_figures(context, client, name, at_s)) is not None]
            problems = [problem for one in seen for problem in _regressions(context, one)]
            if problems:
                return _handle_regression(context, client, problems, _watch_figures(seen))
            if time.time() >= ends_s:
                break
            time.sleep(min(pause_s, max(0.0, ends_s - time.time())))
            pause_s = min(MAX_POLL_S, 1.5 * pause_s)
    count = sum(one.now.searches for one in seen)
    summary = f"{count} live searches in {settings.minutes:g} minutes, no regression"
    return StageOutcome(reasons=(summary, *extend_reference(context)), figures=_watch_figures(seen))


def _search_figures(context: StageContext, client: Client, name: str, at_s: float) -> WatchedCollection | None:
    """Figures of one collection; None while it has had no searches."""
    found = context.outcome_of("backfill").figures
    at = datetime.fromtimestamp(at_s, UTC)
    now = client.search_statistics(name, start=at, space_id=str(found["space_id"]))
    before = client.search_statistics(name, end=at, space_id=str(found["spaces"][name]))
    return WatchedCollection(name, now[0], before[0] if before else None) if now else None


def _regressions(context: StageContext, seen: WatchedCollection) -> list[str]:
    """Regressions of a collection; none before there are `watch.min_searches` searches."""
    settings = context.site.watch
    problems: list[str] = []
    if seen.now.searches < settings.min_searches:
        return []
    share, old_share = seen.now.unknown_share, None if seen.before is None else seen.before.unknown_share
    if share is not None and old_share is not None and share - old_share > settings.max_unknown_rise:
        problems.append(f"{seen.name}: {share:.1%} of searches are decided unknown, {old_share:.1%} before")
    drift = seen.now.drift_index
    if drift is not None and drift > settings.max_drift:
        problems.append(
            f"{seen.name}: best hits drift, stability index {drift:.2f}, at most {settings.max_drift:g} allowed"
        )
    return problems


def _watch_figures(seen: list[WatchedCollection]) -> dict[str, Any]:
    """Figures for the history."""
    return {
        one.name: {"now": asdict(one.now), "before": None if one.before is None else asdict(one.before)} for one in seen
    }


def _handle_regression(
    context: StageContext, client: Client, problems: list[str], figures: dict[str, Any]
) -> StageOutcome:
    """Write an alert, and roll the promotion back if `watch.action` is ``rollback``."""
    alert(context.layout.alerts, context.number, "; ".join(problems))
    if context.site.watch.action == "alert":
        return StageOutcome(
            reasons=(*problems, "kept: watch.action is alert", *extend_reference(context)), figures=figures
        )
    active = read_active(context.layout.active)
    if active is None:
        raise CycleError(f"{context.layout.active} is missing: restore it, or roll back with `resight models`")
    if active.run == context.number:  # else the cycle was killed after the rollback, before recording it
        roll_back(context.site, context.layout, client, active)
    return StageOutcome("rolled_back", tuple(problems), figures)
