"""The command ``resight export``: a checkpoint folder becomes a bundle folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resight.cli_json import JsonOption, write_json


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder that `resight adapt` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Bundle folder to make.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's own by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let a bundle already there give way.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Export a checkpoint to a self-checking bundle for `resight serve`.

    Example: `resight export site-model --out site.bundle`
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from resight.exporters.export import STEPS, export_checkpoint

    console = Console(stderr=True)
    columns = (TextColumn("export"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("checkpoint", total=len(STEPS) + 1)
        bundle = export_checkpoint(
            checkpoint,
            out,
            name=name,
            replace=replace,
            progress=lambda step: bar.update(task, description=step, advance=1),
        )
        bar.update(task, description="done", completed=len(STEPS) + 1)
    manifest = bundle.manifest
    table = Table(
        title=f"bundle {manifest.name}, space {manifest.space_id[:12]}, {manifest.feature_dim} numbers a person"
    )
    for column in ("file", "precision", "size", "min cosine", "max difference"):
        table.add_column(column, justify="left" if column in ("file", "precision") else "right")
    figures = []
    for artefact in manifest.artefacts:
        size = (bundle.path / artefact.file).stat().st_size
        table.add_row(
            artefact.file,
            artefact.precision,
            f"{size / 2**20:.2f} MiB",
            f"{artefact.min_cosine:.7f}",
            f"{artefact.max_abs_diff:.1e}",
        )
        figures.append(
            {
                "file": artefact.file,
                "precision": artefact.precision,
                "bytes": size,
                "min_cosine": artefact.min_cosine,
                "max_abs_diff": artefact.max_abs_diff,
            }
        )
    Console().print(table)
    result = {
        "bundle": str(bundle.path),
        "name": manifest.name,
        "space_id": manifest.space_id,
        "feature_dim": manifest.feature_dim,
        "artefacts": figures,
    }
    write_json(json_file, result)
