"""The first five stages: footage becomes crops, crops a candidate, the candidate is judged and made a bundle.

Each is asked again after a kill and goes on: ingest knows what it has, adapt its last epoch, the others write whole
files and folders at once.
"""

from __future__ import annotations

import glob
import logging

from resight.cycle.active import write_active
from resight.cycle.outcome import Outcome
from resight.cycle.server import connect, find_active
from resight.cycle.site_sections import Camera
from resight.cycle.work import Work
from resight.errors import BundleError, ReIDError, SiteError, TrainingError, UnavailableError

log = logging.getLogger(__name__)


def ingest(work: Work) -> Outcome:
    """Footage of every camera, and kept crops of every collection named, into the site's crop store.

    A source that fails stops no other one; the run fails only when all do.
    """
    told: dict[str, object] = {}
    failed: dict[str, ReIDError] = {}
    for name, arguments in _sources(work).items():
        try:
            told[name] = work.command("ingest", *arguments, figures=f"ingest-{name}") if arguments else "nothing there"
        except ReIDError as error:
            log.error("%s: %s", name, error)
            failed[name] = error
    if failed and not told:
        raise next(iter(failed.values()))
    texts = {name: str(one) for name, one in failed.items()}
    return Outcome(reasons=tuple(map(": ".join, texts.items())), figures={"sources": told, "failed": texts})


def _sources(work: Work) -> dict[str, list[object]]:
    """What `resight ingest` is told of every camera and collection; nothing for a camera without files."""
    into = ("--into", work.layout.crops)
    found: dict[str, list[object]] = {}
    for camera in work.site.camera:
        files = _files(camera)
        found[camera.name] = [*files, *into, "--device", work.site.adapt.device, *_options(camera)] if files else []
    for gallery in work.site.gallery:
        name = gallery.collection
        found[f"gallery-{name}"] = ["--from-gallery", name, "--server", work.site.service.address, *into]
    return found


def _files(camera: Camera) -> list[str]:
    """The files of a camera, by name; an address as it is."""
    return [camera.source] if "://" in camera.source else sorted(glob.glob(camera.source, recursive=True))


def _options(camera: Camera) -> list[object]:
    """What `resight ingest` is told of a camera."""
    given: list[object] = ["--camera", camera.name, "--fps", camera.fps, "--tracks", camera.tracks]
    given += ["--crops-per-track", camera.crops_per_track, "--min-height", camera.min_height]
    if camera.start is not None:
        given += ["--start", camera.start.isoformat()]
    if "://" in camera.source:
        given += ["--duration", camera.seconds]
    if camera.detections is None:
        weights = [] if camera.detector_weights is None else ["--detector-weights", camera.detector_weights]
        return [*given, "--detector", camera.detector, *weights]
    return given + [word for file in sorted(glob.glob(camera.detections)) for word in ("--detections", file)]


def collect(work: Work) -> Outcome:
    """The crops of this run; too few new ones skip it, unsound ones are refused. What is too old leaves the site."""
    wanted = work.site.collect
    found = work.command(
        "collect",
        *("--from", work.layout.crops, "--into", work.folder.site, "--since", work.since_s),
        *("--reference", work.layout.reference, "--min-crops", wanted.min_crops, "--max-crops", wanted.max_crops),
        *("--replay", wanted.replay, "--hold-out", wanted.hold_out, "--seed", work.site.adapt.seed),
        *("--retention", wanted.retention_days, "--purge"),
    )
    reasons = tuple(found["reasons"])
    if found["outcome"] == "ready":
        return Outcome(reasons=reasons, figures=found)
    if found["outcome"] == "skipped":
        return Outcome("skipped", reasons, found)
    return Outcome("refused", reasons, found, used=True)


def freeze(work: Work) -> list[str]:
    """Let what a promoted run has held out join the judge's reference; returns why it did not, which undoes nothing."""
    wanted = work.site.collect
    if not work.folder.site.exists():
        return ["the reference stays as it was: the run's crops are gone"]
    try:
        work.command(
            "collect",
            *("--freeze", work.folder.site, "--reference", work.layout.reference),
            *("--most", wanted.max_reference, "--retention", wanted.retention_days, "--purge"),
            figures="freeze",
        )
    except (ReIDError, OSError) as error:
        log.warning("%s", error)
        return [f"the reference stays as it was: {error}"]
    return []


def adapt(work: Work) -> Outcome:
    """The candidate, from the active model's checkpoint or from the base."""
    if not work.folder.baseline.exists():
        with connect(work.site) as client:
            write_active(work.folder.baseline, find_active(work.site, work.layout, client))
    wanted, active = work.site.adapt, work.baseline()
    start = active.checkpoint if wanted.start_from == "active" and active.checkpoint else wanted.base
    optional = {"--epochs": wanted.epochs, "--iters": wanted.iters}
    more = [word for name, value in optional.items() if value is not None for word in (name, value)]
    more += [word for change in wanted.set for word in ("--set", change)]
    try:
        told = work.command(
            "adapt",
            *("--site", work.folder.site, "--init", start, "--recipe", wanted.recipe),
            *("--out", work.folder.checkpoint, "--seed", wanted.seed, "--device", wanted.device, "--resume", *more),
        )
    except (TrainingError, SiteError) as error:
        return Outcome("refused", (f"no model can be made of these crops: {error}",), used=True)
    return Outcome(figures={"started_from": start, "active": active.model_id, "last_epoch": told["last_epoch"]})


def judge(work: Work) -> Outcome:
    """The candidate against the active model, without a label; both as bundles, so that their times compare."""
    bundle = work.folder.path / "judged.bundle"
    reference = ["--reference", work.layout.reference] if work.layout.reference.is_dir() else []
    try:
        name = f"{work.model_id}-judged"[:63]
        work.command(
            "export", work.folder.checkpoint, "--out", bundle, "--name", name, "--replace", figures="export-judged"
        )
        told = work.command(
            "judge",
            *("--model", bundle, "--against", work.baseline().bundle, "--site", work.folder.site, *reference),
            *("--max-latency-ratio", work.site.gate.max_latency_ratio, "--page", work.folder.page),
        )
    except (TrainingError, SiteError, BundleError) as error:
        return Outcome("refused", (f"these crops judge no model: {error}",), used=True)
    verdict = told["verdict"]
    decision, reasons = verdict["decision"], tuple(verdict["reasons"])
    if decision == "promote" or (decision == "undecided" and work.site.gate.allow_undecided):
        return Outcome(reasons=(f"{decision} by {verdict['evidence']}", *reasons), figures=verdict)
    # What was judged worse came of these crops; of the undecided more crops may make something.
    return Outcome("refused", (f"{decision} by {verdict['evidence']}", *reasons), verdict, used=decision == "refuse")


def export(work: Work) -> Outcome:
    """The candidate's bundle, in the folder of models that is shared with the server."""
    root = work.site.service.model_root
    if not root.is_dir():
        raise UnavailableError(f"folder of models {root} is not there: mount it, or mend [service] model_root")
    told = work.command(
        "export",
        *(work.folder.checkpoint, "--out", work.bundle, "--name", work.model_id, "--replace"),
        *("--precision", work.site.export.precision, "--site", work.folder.site),
        *("--report", work.folder.path / "export.html"),
    )
    return Outcome(figures={"bundle": str(work.bundle), "space_id": told["space_id"], "left_out": told["left_out"]})
