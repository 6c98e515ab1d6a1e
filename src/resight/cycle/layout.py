"""Where everything of a site lies in its state folder; docs/cycle.md draws it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def site(self) -> Path:
        """The crop store that the candidate is adapted to."""
        return self.path / "site"

    @property
    def baseline(self) -> Path:
        """What was active when the run began to adapt, and what the candidate is compared with all along."""
        return self.path / "baseline.json"

    @property
    def checkpoint(self) -> Path:
        """The candidate."""
        return self.path / "checkpoint"

    @property
    def page(self) -> Path:
        """The judge's page; it shows crops."""
        return self.path / "page.html"

    @property
    def pages(self) -> list[Path]:
        """Every page and picture of the run: what may show crops."""
        return sorted(path for path in self.path.rglob("*") if path.suffix in (".html", ".png", ".jpg"))

    def told(self, command: str) -> Path:
        """Where a command writes its figures."""
        return self.path / f"{command}.json"

    def result(self, stage: str) -> Path:
        """What a stage came to; written as its last act."""
        return self.path / "results" / f"{stage}.json"

    def error(self, stage: str) -> Path:
        """Why a stage's last try failed."""
        return self.path / "results" / f"{stage}.error.json"

    def log(self, stage: str) -> Path:
        """What a stage said."""
        return self.path / "log" / f"{stage}.log"


@dataclass(frozen=True)
class Layout:
    """The files of a site's state folder."""

    state: Path

    @property
    def crops(self) -> Path:
        """The growing crop store."""
        return self.state / "crops"

    @property
    def reference(self) -> Path:
        """The judge's frozen crops of earlier nights."""
        return self.state / "reference"

    @property
    def database(self) -> Path:
        """Runs and stages."""
        return self.state / "cycle.sqlite3"

    @property
    def active(self) -> Path:
        """What is promoted."""
        return self.state / "active.json"

    @property
    def lock(self) -> Path:
        """Held by the cycle."""
        return self.state / "cycle.lock"

    @property
    def stage_lock(self) -> Path:
        """Held by the process of a stage."""
        return self.state / "stage.lock"

    @property
    def alerts(self) -> Path:
        """One line of JSON for every alert."""
        return self.state / "alerts.jsonl"

    @property
    def history(self) -> Path:
        """Pages of all runs."""
        return self.state / "history"

    @property
    def runs(self) -> Path:
        """Folders of runs."""
        return self.state / "runs"

    def run(self, number: int) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.runs / f"{number:06d}")

    def page(self, number: int) -> Path:
        """The page of a run in the history."""
        return self.history / f"run-{number:06d}.html"
