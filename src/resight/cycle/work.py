"""What the function of a stage is given, and how it runs a command of `resight`."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resight.cycle.active import Active, read_active
from resight.cycle.layout import Layout, RunFolder
from resight.cycle.outcome import Outcome, read_outcome
from resight.cycle.server import options
from resight.cycle.site_file import SiteFile
from resight.errors import CycleError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One stage of one run.

    Attributes:
        site: as its file tells it now.
        number: of the run.
        since_s: capture time up to which crops were used by earlier runs.
    """

    site: SiteFile
    number: int
    since_s: float

    @property
    def layout(self) -> Layout:
        """The state folder."""
        return Layout(self.site.state)

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

    def came_to(self, stage: str) -> Outcome:
        """What an earlier stage of this run came to."""
        found = read_outcome(self.folder.result(stage))
        if found is None:
            raise CycleError(f"{self.folder.result(stage)} is gone: restore it, or remove the run's row")
        return found

    def baseline(self) -> Active:
        """What was active when the run began to adapt."""
        found = read_active(self.folder.baseline)
        if found is None:
            raise CycleError(f"{self.folder.baseline} is gone: restore it, or remove the run's row")
        return found

    def command(self, name: str, *arguments: object, figures: str = "") -> dict[str, Any]:
        """Run a command of `resight` in this process.

        Args:
            name: of the command; the access to the server stands before it.
            *arguments: behind it; ``--json`` is added.
            figures: name of the file for its figures; the command's own by default.

        Returns:
            What it wrote with ``--json``.

        Raises:
            ReIDError: its own error.
            CycleError: it ended with another status than 0.
        """
        from resight.cli import app

        told = self.folder.told(figures or name)
        told.unlink(missing_ok=True)
        words = [*options(self.site), name, *map(str, arguments), "--json", str(told)]
        log.info("resight %s", shlex.join(words))
        status = app(words, standalone_mode=False)
        if status:
            raise CycleError(f"`resight {name}` ended with status {status}: its log tells why")
        found: dict[str, Any] = json.loads(told.read_text())
        return found
