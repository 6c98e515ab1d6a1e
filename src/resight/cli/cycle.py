"""The commands ``resight cycle``: the loop from footage to a better model, once or on a schedule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli.options import JsonOption, write_json

if TYPE_CHECKING:
    from resight.cycle.runs import CycleRun

cycle = typer.Typer(
    help="Improve the model of a site from its footage, every night or on request.", no_args_is_help=True
)

SiteFileArgument = Annotated[Path, typer.Argument(metavar="SITE_TOML", help="The site's file, or its folder.")]
DEFAULT_SITE_FILE = Path("site.toml")
RUN_COLOURS = {"promoted": "green", "refused": "yellow", "failed": "red", "rolled_back": "red"}
EXIT_UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: the next call resumes the run


@cycle.command()
def init(folder: Annotated[Path, typer.Argument(help="Folder for site.toml; created if missing.")]) -> None:
    """Write a site.toml in which every key is explained. Example: `resight cycle init lobby/`."""
    from resight import cycle as package
    from resight.errors import AlreadyExistsError

    path = folder / DEFAULT_SITE_FILE.name
    if path.exists():
        raise AlreadyExistsError(f"{path} exists: edit it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text((Path(package.__path__[0]) / DEFAULT_SITE_FILE.name).read_text())
    Console().print(f"wrote {path}: enter the server and the cameras, then run `resight cycle once {path}`")


@cycle.command()
def once(
    site: SiteFileArgument = DEFAULT_SITE_FILE,
    now: Annotated[bool, typer.Option("--now", help="Also outside the maintenance window.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Resume the unfinished run, or start a new one. Example: `resight cycle once lobby/site.toml`.

    Exit status 0: promoted, refused or skipped; 1: failed or rolled back; 75: interrupted, the next call resumes it.
    """
    import signal

    from resight.cycle import history
    from resight.cycle.conductor import Conductor
    from resight.cycle.runs import RunDatabase
    from resight.cycle.site import load_site
    from resight.cycle.state_folder import StateFolder

    conductor = Conductor(site, ignore_window=now)
    signal.signal(signal.SIGTERM, lambda number, frame: conductor.stop.set())
    signal.signal(signal.SIGINT, lambda number, frame: conductor.stop.set())
    ended = conductor.run_once()
    with RunDatabase(StateFolder(load_site(site).state).database) as runs:
        write_json(json_file, history.run_report(runs, ended))
    Console().print(
        f"run {ended.run}: {_coloured_state(ended)} {escape(ended.reason)}", highlight=False, soft_wrap=True
    )
    if ended.state in ("failed", "rolled_back"):
        raise typer.Exit(1)
    if ended.state == "running":
        raise typer.Exit(EXIT_UNFINISHED)


@cycle.command()
def run(site: SiteFileArgument = DEFAULT_SITE_FILE) -> None:
    """Start runs on schedule and on request. Example: `resight cycle run lobby/site.toml`.

    SIGTERM or Ctrl-C stops it; the current stage is terminated, and resumed at the next start.
    """
    from resight.cycle.schedule import CycleScheduler

    CycleScheduler(site).run()


@cycle.command("stage", hidden=True)
def stage_process(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Stage of the run.")],
    site: Annotated[Path, typer.Argument(metavar="SITE_TOML", help="The site's file.")],
    number: Annotated[int, typer.Argument(metavar="RUN", help="Number of the run.")],
) -> None:
    """Run one stage of a run; started by `resight cycle once` and `resight cycle run`, not by hand.

    Example: `resight cycle stage collect lobby/site.toml 12`
    """
    from resight.cycle.process import run_stage_process

    root = context.find_root().command

    def run_command(words: list[str]) -> int | None:
        exit_status: int | None = root.main(words, standalone_mode=False)
        return exit_status

    if run_stage_process(name, site, number, run_command=run_command):
        raise typer.Exit(1)


@cycle.command()
def status(site: SiteFileArgument = DEFAULT_SITE_FILE, json_file: JsonOption = None) -> None:
    """Show the state of the cycle, and its last run. Example: `resight cycle status lobby/site.toml`."""
    from resight.cycle import history
    from resight.cycle.history import read_alerts
    from resight.cycle.runs import RunDatabase
    from resight.cycle.schedule import next_fire
    from resight.cycle.site import load_site
    from resight.cycle.state_folder import StateFolder, read_active
    from resight.locks import lock_holder

    read = load_site(site)
    layout = StateFolder(read.state)
    held, active, due = lock_holder(layout.lock), read_active(layout.active), next_fire(read, datetime.now(UTC))
    report: dict[str, Any] = {"site": read.name, "held_by": held, "next": due and due.isoformat()}
    report |= {"active": active and active.model_id, "alerts": read_alerts(layout.alerts)[-5:], "run": None}
    console = Console()
    console.print(f"site {read.name}: {held or 'not running'}", highlight=False)
    console.print(
        f"active: {active.model_id if active else 'the model that the server was started with'}", highlight=False
    )
    console.print(f"next scheduled run: {due}", highlight=False)
    for one in report["alerts"]:
        console.print(f"[red]alert[/red] of run {one['run']}: {escape(str(one['text']))}", highlight=False)
    with RunDatabase(layout.database) as runs:
        for last in runs.runs(limit=1):
            report["run"] = history.run_report(runs, last)
            console.print(_stage_table(report["run"], f"run {last.run}: {_coloured_state(last)} {escape(last.reason)}"))
    write_json(json_file, report)


@cycle.command("history")
def show_history(
    site: SiteFileArgument = DEFAULT_SITE_FILE,
    limit: Annotated[int, typer.Option(min=1, help="Number of runs, newest first.")] = 20,
    json_file: JsonOption = None,
) -> None:
    """List the runs and rewrite their pages. Example: `resight cycle history lobby/site.toml`."""
    from resight.cycle import history
    from resight.cycle.runs import RunDatabase
    from resight.cycle.site import load_site
    from resight.cycle.state_folder import StateFolder

    read = load_site(site)
    layout = StateFolder(read.state)
    table = Table("run", "began", "result", "duration", "reason", title=f"runs of {escape(read.name)}")
    with RunDatabase(layout.database) as runs:
        history.write_pages(read, layout, runs)
        found = runs.runs(limit=limit)
        for one in found:
            duration_s = None if one.ended_s is None else one.ended_s - one.began_s
            cells = (
                history.format_time(one.began_s),
                _coloured_state(one),
                history.format_span(duration_s),
                escape(one.reason),
            )
            table.add_row(str(one.run), *cells)
        write_json(json_file, [history.run_report(runs, one) for one in found])
    Console().print(table)
    Console().print(f"pages: {layout.history / 'index.html'}", highlight=False, soft_wrap=True)


@cycle.command()
def rollback(site: SiteFileArgument = DEFAULT_SITE_FILE) -> None:
    """Roll back the last promotion. Example: `resight cycle rollback lobby/site.toml`.

    The previous model and the previous space of each collection become active again; no entry is lost. The next run
    starts from the model that is active then.
    """
    from resight.cycle.rollback import manual_rollback

    for line in manual_rollback(site):
        Console().print(line, highlight=False, soft_wrap=True)


def _coloured_state(run: CycleRun) -> str:
    colour = RUN_COLOURS.get(run.state, "bold")
    return f"[{colour}]{run.state.replace('_', ' ')}[/{colour}]"


def _stage_table(report: dict[str, Any], title: str) -> Table:
    """The stages of one run."""
    from resight.cycle.history import format_span

    table = Table("stage", "result", "starts", "duration", "reason", title=title)
    for one in report["stages"]:
        why = "; ".join(one["reasons"]) or one["error"]
        table.add_row(
            one["stage"], one["verdict"] or one["state"], str(one["starts"]), format_span(one["seconds"]), escape(why)
        )
    return table
