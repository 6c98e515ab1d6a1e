"""The commands ``resight cycle``: the loop from footage to a better model, once or on a schedule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli_json import JsonOption, write_json

if TYPE_CHECKING:
    from resight.cycle.state import Run

cycle = typer.Typer(help="Keep a site's model up: footage in, a better model out, judged.", no_args_is_help=True)

SiteFileArgument = Annotated[Path, typer.Argument(metavar="SITE_TOML", help="The site's file, or its folder.")]
HERE = Path("site.toml")
COLOURS = {"promoted": "green", "refused": "yellow", "failed": "red", "rolled_back": "red"}
LATER = 75  # EX_TEMPFAIL of sysexits.h: the run goes on the next time


@cycle.command()
def init(folder: Annotated[Path, typer.Argument(help="Folder to write site.toml into; made when missing.")]) -> None:
    """Write a site's file with every key explained. Example: `resight cycle init lobby/`."""
    from resight import cycle as package
    from resight.errors import AlreadyExistsError

    path = folder / HERE.name
    if path.exists():
        raise AlreadyExistsError(f"{path} exists: change that one, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text((Path(package.__path__[0]) / HERE.name).read_text())
    Console().print(f"wrote {path}: tell it of the server and the cameras, then `resight cycle once {path}`")


@cycle.command()
def once(
    site: SiteFileArgument = HERE,
    now: Annotated[bool, typer.Option("--now", help="Outside the maintenance window too.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Go on with an unfinished run, or do a new one. Example: `resight cycle once lobby/site.toml`.

    Exit status 0: promoted, refused or skipped; 1: failed or rolled back; 75: it goes on the next time.
    """
    import signal

    from resight.cycle import history
    from resight.cycle.conductor import Conductor
    from resight.cycle.layout import Layout
    from resight.cycle.site_file import load_site
    from resight.cycle.state import Runs

    conductor = Conductor(site, ignore_window=now)
    signal.signal(signal.SIGTERM, lambda number, frame: conductor.stop.set())
    signal.signal(signal.SIGINT, lambda number, frame: conductor.stop.set())
    ended = conductor.once()
    with Runs(Layout(load_site(site).state).database) as runs:
        write_json(json_file, history.told(runs, ended))
    Console().print(f"run {ended.run}: {_coloured(ended)} {escape(ended.reason)}", highlight=False, soft_wrap=True)
    if ended.state in ("failed", "rolled_back"):
        raise typer.Exit(1)
    if ended.state == "running":
        raise typer.Exit(LATER)


@cycle.command()
def run(site: SiteFileArgument = HERE) -> None:
    """Do a run whenever it is time for one, or asked for. Example: `resight cycle run lobby/site.toml`.

    SIGTERM or Ctrl-C end it; the stage under way is ended and goes on at the next start.
    """
    from resight.cycle.schedule import Keeper

    Keeper(site).keep()


@cycle.command()
def status(site: SiteFileArgument = HERE, json_file: JsonOption = None) -> None:
    """Show what the cycle is doing. Example: `resight cycle status lobby/site.toml`."""
    from resight.cycle import history
    from resight.cycle.active import read_active
    from resight.cycle.alerts import alerts
    from resight.cycle.layout import Layout
    from resight.cycle.lock import holder
    from resight.cycle.schedule import next_fire
    from resight.cycle.site_file import load_site
    from resight.cycle.state import Runs

    read = load_site(site)
    layout = Layout(read.state)
    held, active, due = holder(layout.lock), read_active(layout.active), next_fire(read, datetime.now(UTC))
    told: dict[str, Any] = {"site": read.name, "held_by": held, "next": due and due.isoformat()}
    told |= {"active": active and active.model_id, "alerts": alerts(layout.alerts)[-5:], "run": None}
    console = Console()
    console.print(f"site {read.name}: {held or 'nobody works on it'}", highlight=False)
    console.print(f"active: {active.model_id if active else 'what the server was started with'}", highlight=False)
    console.print(f"next run by the schedule: {due}", highlight=False)
    for one in told["alerts"]:
        console.print(f"[red]alert[/red] of run {one['run']}: {escape(str(one['text']))}", highlight=False)
    with Runs(layout.database) as runs:
        for last in runs.runs(limit=1):
            told["run"] = history.told(runs, last)
            console.print(_stages(told["run"], f"run {last.run}: {_coloured(last)} {escape(last.reason)}"))
    write_json(json_file, told)


@cycle.command("history")
def show_history(
    site: SiteFileArgument = HERE,
    limit: Annotated[int, typer.Option(min=1, help="Runs shown, the newest first.")] = 20,
    json_file: JsonOption = None,
) -> None:
    """List the runs and write their pages anew. Example: `resight cycle history lobby/site.toml`."""
    from resight.cycle import history
    from resight.cycle.layout import Layout
    from resight.cycle.site_file import load_site
    from resight.cycle.state import Runs

    read = load_site(site)
    layout = Layout(read.state)
    table = Table("run", "began", "ended as", "took", "why", title=f"runs of {escape(read.name)}")
    with Runs(layout.database) as runs:
        history.write(read, layout, runs)
        found = runs.runs(limit=limit)
        for one in found:
            took = None if one.ended_s is None else one.ended_s - one.began_s
            cells = (history.when(one.began_s), _coloured(one), history.spell_span(took), escape(one.reason))
            table.add_row(str(one.run), *cells)
        write_json(json_file, [history.told(runs, one) for one in found])
    Console().print(table)
    Console().print(f"pages: {layout.history / 'index.html'}", highlight=False, soft_wrap=True)


@cycle.command()
def rollback(site: SiteFileArgument = HERE) -> None:
    """Take the last promotion back. Example: `resight cycle rollback lobby/site.toml`.

    Collections are searched in the space before, by the model before; nobody enrolled since is lost. The next run
    begins from what is active then.
    """
    from resight.cycle.undo import by_hand

    for line in by_hand(site):
        Console().print(line, highlight=False, soft_wrap=True)


def _coloured(run: Run) -> str:
    colour = COLOURS.get(run.state, "bold")
    return f"[{colour}]{run.state.replace('_', ' ')}[/{colour}]"


def _stages(told: dict[str, Any], title: str) -> Table:
    """The stages of one run."""
    from resight.cycle.history import spell_span

    table = Table("stage", "came to", "tries", "took", "why", title=title)
    for one in told["stages"]:
        why = "; ".join(one["reasons"]) or one["error"]
        table.add_row(
            one["stage"], one["verdict"] or one["state"], str(one["starts"]), spell_span(one["seconds"]), escape(why)
        )
    return table
