"""`resight collect`: the crops of one night's work out of a site's growing store."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.cli_json import JsonOption, write_json
from resight.errors import InputError

DAY_S = 86_400.0


def collect(
    source: Annotated[Path | None, typer.Option("--from", help="The site's growing crop store.")] = None,
    into: Annotated[Path | None, typer.Option(help="Crop store of the run, to be made.")] = None,
    since: Annotated[float, typer.Option(help="Unix seconds; crops taken later are new.")] = 0.0,
    reference: Annotated[
        Path | None, typer.Option(help="The judge's frozen store; its tracks are never taken.")
    ] = None,
    min_crops: Annotated[int, typer.Option(min=1, help="Fewer new crops, and the outcome is `skipped`.")] = 500,
    max_crops: Annotated[int, typer.Option(min=2, help="Most crops taken, older ones included.")] = 20_000,
    replay: Annotated[float, typer.Option(min=0, max=0.9, help="Share of older crops among all.")] = 0.3,
    hold_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of each camera's new crops to be judged on.")
    ] = 0.2,
    retention: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Crops older than this are never taken.")
    ] = None,
    purge: Annotated[bool, typer.Option("--purge", help="Remove such crops from both stores, files and rows.")] = False,
    freeze: Annotated[
        Path | None, typer.Option(metavar="SITE", help="Instead: let what this run's store holds out join --reference.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Crops the reference may hold.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every choice.")] = 0,
    now: Annotated[float | None, typer.Option(help="Unix seconds to take for now; the clock by default.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Collect what one adaptation needs: new sound crops in balance, some older ones, some held out to judge on.

    Example: `resight collect --from state/crops --into run/site --since 1772488800 --retention 30 --purge`

    Example: `resight collect --freeze run/site --reference state/reference --most 4000`
    """
    now_s = time.time() if now is None else now
    if purge and retention is None:
        raise InputError("--purge needs --retention DAYS: what is older is removed")
    before_s = -math.inf if retention is None else now_s - retention * DAY_S
    purged = _purge(before_s, source, reference) if purge else 0
    if freeze is not None:
        if reference is None or source is not None or into is not None:
            raise InputError("--freeze SITE needs --reference STORE, and neither --from nor --into")
        from resight.training.reference import freeze as add_to_reference

        frozen = add_to_reference(freeze, reference, most=most, before_s=before_s)
        write_json(json_file, {"outcome": "frozen", **frozen, "purged": purged})
        return
    if source is None or into is None:
        raise InputError("expected --from STORE and --into SITE, or --freeze SITE and --reference STORE")
    from resight.training.collect import CollectSettings
    from resight.training.collect import collect as collect_crops

    settings = CollectSettings(since, min_crops, max_crops, replay, hold_out, retention, seed)
    found = collect_crops(source, into, settings, reference=reference, now_s=now_s).to_json()
    _tell(found, into)
    write_json(json_file, {**found, "site": str(into), "purged": purged})


def _purge(before_s: float, source: Path | None, reference: Path | None) -> int:
    """How many crops left the stores; what the source has not any more leaves the reference too."""
    from resight.training.purge import purge

    removed = 0 if source is None else purge(source, before_s)
    return removed + (0 if reference is None else purge(reference, before_s, source=source))


def _tell(found: dict[str, Any], into: Path) -> None:
    """Cameras as a table, the outcome, and why."""
    console = Console()
    if found["cameras"]:
        kinds = ("train", "replayed", "held_out")
        table = Table("camera", "to adapt to", "of those older", "held out", title=escape(str(into)))
        for name, counts in found["cameras"].items():
            table.add_row(escape(name), *(str(counts[kind]) for kind in kinds))
        console.print(table)
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found["crops"].items())
    console.print(f"{found['outcome']}: {counts}", markup=False, highlight=False, soft_wrap=True)
    for reason in found["reasons"]:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
