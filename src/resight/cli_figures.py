"""The commands ``resight models shadow`` and ``resight gallery figures``: a candidate beside, what searches gave."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli_connect import connect
from resight.cli_gallery import DEFAULT_SERVER, Name, Server, duration
from resight.cli_json import JsonOption, write_json

SIDES = ("matches", "uncertain", "unknown", "without_hit", "unknown_share", "mean_probability", "mean_cosine")
TIMES = ("infer_p50_ns", "infer_p95_ns", "search_p50_ns", "search_p95_ns", "total_p50_ns", "total_p95_ns")
SHARED = ("top1_agreement", "overlap_at_10", "decision_agreement", "cosine_shift")
COUNTS = ("searches", "matches", "uncertain", "unknown", "without_hit")
MEANS = ("unknown_share", "mean_cosine", "mean_probability", "drift_index", "mean_shift")


def shadow(
    name: Name,
    model: Annotated[str, typer.Argument(help="Loaded model to begin with; none = show how it stands.")] = "",
    sample: Annotated[float, typer.Option(help="Share of the searches of crops, above 0, at most 1.")] = 1.0,
    max_searches: Annotated[int, typer.Option(help="End after so many; 0 = without such an end.")] = 0,
    ends_after: Annotated[str | None, typer.Option("--for", help="End after this time: 12h, 2d.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End it.")] = False,
    server: Server = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Let a candidate answer live searches too, for figures alone. Example: `resight models shadow lobby lobby-2`.

    The collection must be migrated to it first, and not be searched with it yet. Without a model: `resight models
    shadow lobby` shows the figures so far, `--stop` ends it.
    """
    with connect(server) as client:
        if stop:
            found = client.stop_shadow(name)
        elif model:
            lives = None if ends_after is None else duration(ends_after)
            found = client.start_shadow(name, model, sample=sample, max_searches=max_searches, expire_after=lives)
        else:
            found = client.get_shadow(name)
    figures = found.figures
    told = f"{figures.answered} of {figures.sampled} sampled, {figures.dropped} dropped, {figures.failed} failed"
    console = Console()
    heading = f"{name}: {found.model_id} beside {found.active_model_id}, {found.state}, {told}"
    console.print(heading, highlight=False, soft_wrap=True)
    table = Table("figure", found.active_model_id, found.model_id)
    for figure in SIDES:
        table.add_row(figure, _cell(getattr(figures.active, figure)), _cell(getattr(figures.candidate, figure)))
    for figure in TIMES if figures.active.measured else ():
        times = [f"{getattr(side, figure) / 1e6:.2f}" for side in (figures.active, figures.candidate)]
        table.add_row(figure.replace("_ns", "_ms"), *times)
    for figure in SHARED:
        table.add_row(figure, "", _cell(getattr(figures, figure)))
    console.print(table)
    write_json(json_file, asdict(found))


def figures(
    name: Name,
    last: Annotated[str | None, typer.Option(help="Only of this time until now: 12h, 7d.")] = None,
    space: Annotated[str, typer.Option(help="Only in this space.")] = "",
    server: Server = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Show what searches came to in each space. Example: `resight gallery figures lobby --last 24h`."""
    start = None if last is None else datetime.now(UTC) - duration(last)
    with connect(server) as client:
        found = client.search_figures(name, start=start, space_id=space)
    console = Console()
    console.print(f"searches of {name}; * = the space it is searched in", highlight=False, soft_wrap=True)
    table = Table("figure", *(f"{one.model_id} {one.space_id[:8]}{' *' if one.active else ''}" for one in found))
    for figure in (*COUNTS, *MEANS):
        table.add_row(figure, *(_cell(getattr(one, figure)) for one in found))
    for figure in ("first_time", "last_time"):
        table.add_row(figure, *(f"{getattr(one, figure):%Y-%m-%d %H:%M}" for one in found))
    console.print(table)
    write_json(json_file, [asdict(one) for one in found])


def _cell(value: float | None) -> str:
    """A figure as a table shows it."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
