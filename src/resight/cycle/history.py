"""The history of a site: alerts, HTML pages of the runs, and the removal of what has expired.

An alert is a log line and a line of JSON in `alerts.jsonl`; nothing else is notified. There is a page for each run and
one that lists them; they load no external resources, and show crops until these expire. Figures are kept: the database,
the results and logs of stages, `active.json` and the history without pages contain no crops.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from resight.client import Client
from resight.cycle.runs import CycleRun, RunDatabase
from resight.cycle.server import connect
from resight.cycle.site import SiteFile
from resight.cycle.state_folder import StateFolder, read_active
from resight.errors import ReIDError
from resight.files import write_atomic

log = logging.getLogger(__name__)


def alert(path: Path, run: int, text: str) -> None:
    """Log an alert and append it to a file; it is on disk when this returns."""
    log.error("ALERT run=%d %s", run, text)
    line = json.dumps({"time_s": time.time(), "run": run, "text": text}) + "\n"
    with path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_alerts(path: Path, *, run: int | None = None) -> list[dict[str, object]]:
    """All alerts, oldest first, of one run or of all runs; an incomplete line left by a kill is skipped."""
    alerts = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if run is None or record.get("run") == run:
            alerts.append(record)
    return alerts


MAX_LIST_VALUES = 8  # longer lists, such as histograms, are shown by their length
PAGES = {"page.html": "The judge's page", "checkpoint-log/report.html": "The adaptation", "export.html": "The export"}


def write_pages(site: SiteFile, layout: StateFolder, runs: RunDatabase) -> None:
    """Write the list of runs, and the pages of runs that have none or may have changed."""
    layout.history.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = runs.runs()
    for run in found[:2]:  # the newest, and the one before it, which a rollback may have changed
        write_run_page(site, layout, runs, run)
    for run in found[2:]:
        if not layout.page(run.run).exists():  # deleted because its crops expired; written again without them
            write_run_page(site, layout, runs, run)
    rows = [(run, layout.page(run.run).name, _span(run), _judge_reason(runs, run)) for run in found]
    page = _environment().get_template("history.html.j2").render(site=site, rows=rows)
    write_atomic(layout.history / "index.html", page.encode())


def write_run_page(site: SiteFile, layout: StateFolder, runs: RunDatabase, run: CycleRun) -> None:
    """Write the page of one run."""
    folder = layout.run(run.run)
    shown = {title: folder.path / name for name, title in PAGES.items() if (folder.path / name).is_file()}
    page = (
        _environment()
        .get_template("run.html.j2")
        .render(
            site=site,
            run=run,
            span=_span(run),
            model_id=site.model_id(run.run),
            stages=[(one, _stage_span(one), _stage_figures(one)) for one in runs.stages(run.run).values()],
            alerts=read_alerts(layout.alerts, run=run.run),
            pages={title: path.read_text() for title, path in shown.items()},
        )
    )
    layout.history.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(layout.page(run.run), page.encode())


def run_report(runs: RunDatabase, run: CycleRun) -> dict[str, Any]:
    """A run and its stages as plain values, for ``--json``."""
    stages = [
        {
            "stage": one.stage,
            "state": one.state,
            "starts": one.starts,
            "seconds": _stage_span(one),
            "error": one.error,
            "verdict": None if one.outcome is None else one.outcome.verdict,
            "reasons": [] if one.outcome is None else list(one.outcome.reasons),
            "figures": {} if one.outcome is None else dict(one.outcome.figures),
        }
        for one in runs.stages(run.run).values()
    ]
    return {**vars(run), "stages": stages}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(__file__.rpartition("/")[0]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"when": format_time, "span": format_span}
    return environment


def format_time(time_s: float | None) -> str:
    """Unix time as people write it."""
    return "" if time_s is None else f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def format_span(seconds: float | None) -> str:
    """Seconds as people say them: 4.2 s, 3 min 05 s, 1 h 02 min."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _span(run: CycleRun) -> float | None:
    return None if run.ended_s is None else run.ended_s - run.began_s


def _stage_span(stage: Any) -> float | None:
    return None if stage.ended_s is None else round(stage.ended_s - stage.began_s, 3)


def _stage_figures(stage: Any) -> dict[str, str]:
    return {} if stage.outcome is None else dict(flatten_figures(stage.outcome.figures))


def _judge_reason(runs: RunDatabase, run: CycleRun) -> str:
    """What decided a run, in a few words."""
    judged = runs.stages(run.run).get("judge")
    outcome = None if judged is None else judged.outcome
    return outcome.reasons[0] if outcome is not None and outcome.reasons else ""


def flatten_figures(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value as text) of every leaf; long lists are replaced by their length."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten_figures(value, f"{name}.")
        elif isinstance(value, list | tuple):
            short = ", ".join(map(str, value)) if len(value) <= MAX_LIST_VALUES else f"{len(value)} values"
            rows.append((name, short))
        elif value is not None:
            rows.append((name, f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)))
    return rows


DAY_S = 86_400.0
CHECKPOINT_FOLDERS = ("checkpoint", "checkpoint-teacher", "judged.bundle")


def apply_retention(site: SiteFile, layout: StateFolder, runs: RunDatabase) -> None:
    """Remove expired pages, crops, checkpoints and models; the unfinished run is not touched."""
    chain = read_active(layout.active)
    kept = set() if chain is None else {one.run for one in chain.chain()}
    for run in runs.runs():
        if run.state == "running":
            continue
        _expire_crops(site, layout, run)
        if run.run not in kept:
            for name in CHECKPOINT_FOLDERS:
                shutil.rmtree(layout.run(run.run).path / name, ignore_errors=True)
        else:  # teacher and judged bundle are not needed after the run
            for name in CHECKPOINT_FOLDERS[1:]:
                shutil.rmtree(layout.run(run.run).path / name, ignore_errors=True)
    unfinished = runs.unfinished()
    try:
        with connect(site) as client:
            _drop_models(site, client, kept | ({unfinished.run} if unfinished else set()))
    except (ReIDError, OSError) as error:
        log.warning("unused models could not be removed: %s", error)


def _expire_crops(site: SiteFile, layout: StateFolder, run: CycleRun) -> None:
    """Delete pages after their retention time, because they show crops, and crops of the run that a kill left."""
    folder = layout.run(run.run)
    shutil.rmtree(folder.site, ignore_errors=True)
    if time.time() - run.began_s > site.collect.history_days * DAY_S:
        for page in [*folder.pages, layout.page(run.run)]:
            page.unlink(missing_ok=True)


def _drop_models(site: SiteFile, client: Client, kept: set[int]) -> None:
    """Unload and remove models that are in no rollback chain and in no collection's active space."""
    searched = {one.space_id for one in client.collections()}
    own = re.compile(re.escape(site.name) + r"-(\d{6,})")
    for model in list(client.models()):
        found = own.fullmatch(model.model_id)
        if found is None or int(found[1]) in kept or model.active or model.space_id in searched:
            continue
        if model.state == "ready":
            client.unload_model(model.model_id)
        shutil.rmtree(site.service.model_root / model.model_id, ignore_errors=True)
        log.info("removed model %s", model.model_id)
