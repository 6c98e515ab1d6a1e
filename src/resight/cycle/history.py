"""The history: a page for each run and one that lists them. They load nothing, and show crops until these expire."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from resight.atomic import write_atomic
from resight.cycle.alerts import alerts
from resight.cycle.layout import Layout
from resight.cycle.site_file import SiteFile
from resight.cycle.state import Run, Runs

MOST_SHOWN = 8  # values of a list on a page; a histogram is none to read
PAGES = {"page.html": "The judge's page", "checkpoint-log/report.html": "The adaptation", "export.html": "The export"}


def write(site: SiteFile, layout: Layout, runs: Runs) -> None:
    """Write the pages of all runs that have none or may have changed, and the list."""
    layout.history.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = runs.runs()
    for run in found[:2]:  # the newest, and the one before, which a rollback may have marked
        write_run(site, layout, runs, run)
    for run in found[2:]:
        if not layout.page(run.run).exists():  # its crops expired: without them
            write_run(site, layout, runs, run)
    rows = [(run, layout.page(run.run).name, _span(run), _figures_of(runs, run)) for run in found]
    page = _environment().get_template("history.html.j2").render(site=site, rows=rows)
    write_atomic(layout.history / "index.html", page.encode())


def write_run(site: SiteFile, layout: Layout, runs: Runs, run: Run) -> None:
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
            alerts=alerts(layout.alerts, run=run.run),
            pages={title: path.read_text() for title, path in shown.items()},
        )
    )
    layout.history.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(layout.page(run.run), page.encode())


def told(runs: Runs, run: Run) -> dict[str, Any]:
    """Everything of a run as plain values, for ``--json``."""
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
    environment.filters |= {"when": when, "span": spell_span}
    return environment


def when(time_s: float | None) -> str:
    """Unix time as people write it."""
    return "" if time_s is None else f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def spell_span(seconds: float | None) -> str:
    """Seconds as people say them: 4.2 s, 3 min 05 s, 1 h 02 min."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _span(run: Run) -> float | None:
    return None if run.ended_s is None else run.ended_s - run.began_s


def _stage_span(stage: Any) -> float | None:
    return None if stage.ended_s is None else round(stage.ended_s - stage.began_s, 3)


def _stage_figures(stage: Any) -> dict[str, str]:
    return {} if stage.outcome is None else dict(flat(stage.outcome.figures))


def _figures_of(runs: Runs, run: Run) -> str:
    """What decided a run, in a few words."""
    judged = runs.stages(run.run).get("judge")
    outcome = None if judged is None else judged.outcome
    return outcome.reasons[0] if outcome is not None and outcome.reasons else ""


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value as text) of every leaf; long lists are told by their length."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            short = ", ".join(map(str, value)) if len(value) <= MOST_SHOWN else f"{len(value)} values"
            rows.append((name, short))
        elif value is not None:
            rows.append((name, f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)))
    return rows
