"""The option `--json FILE` of every command that measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from resight.atomic import write_atomic

JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]


def write_json(path: Path | None, value: Any) -> None:
    """Write figures where the user wants them; missing folders are made, so that no long run ends in an error."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(value, indent=2, default=str) + "\n").encode())
