"""The files of a site's state folder: paths, the outcomes of stages, and `active.json`. docs/cycle.md shows the layout.

The outcome of a stage is written as the stage's last act. `active.json` holds a chain of models, written atomically:
the active model, the one it replaced, and the one before that. A rollback goes back along the chain, and the
checkpoint of the server's active model is looked up in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from resight.errors import CycleError
from resight.files import files_below, write_atomic


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
        """The model that was active when the run began to adapt; the candidate is compared with it."""
        return self.path / "baseline.json"

    @property
    def checkpoint(self) -> Path:
        """The candidate's checkpoint."""
        return self.path / "checkpoint"

    @property
    def page(self) -> Path:
        """The page of the judgement; it shows crops."""
        return self.path / "page.html"

    @property
    def pages(self) -> list[Path]:
        """Every page and image of the run; they may show crops."""
        return sorted(path for path in files_below(self.path) if path.suffix in (".html", ".png", ".jpg"))

    def figures_file(self, command: str) -> Path:
        """The file into which a command writes its figures."""
        return self.path / f"{command}.json"

    def result(self, stage: str) -> Path:
        """The outcome of a stage; written as its last act."""
        return self.path / "results" / f"{stage}.json"

    def error(self, stage: str) -> Path:
        """The error of a stage's last attempt."""
        return self.path / "results" / f"{stage}.error.json"

    def log(self, stage: str) -> Path:
        """The log of a stage."""
        return self.path / "log" / f"{stage}.log"


@dataclass(frozen=True)
class StateFolder:
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
        """The promoted model and its predecessors."""
        return self.state / "active.json"

    @property
    def lock(self) -> Path:
        """The lock held by a cycle."""
        return self.state / "cycle.lock"

    @property
    def stage_lock(self) -> Path:
        """The lock held by the process of a stage."""
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


StageVerdict = Literal["done", "skipped", "refused", "rolled_back"]
STAGE_VERDICTS = ("done", "skipped", "refused", "rolled_back")


@dataclass(frozen=True)
class StageOutcome:
    """The outcome of one stage of one run.

    Attributes:
        verdict: done = the run continues; every other verdict ends it.
        reasons: as text, with figures.
        figures: plain values, for the history and for later stages.
        used: the run ends here, and its crops do not count as new in later runs.
    """

    verdict: StageVerdict = "done"
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    used: bool = False

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({**vars(self), "reasons": list(self.reasons)}, indent=2, default=str)

    @classmethod
    def from_json(cls, text: str) -> StageOutcome:
        """From the text of `to_json`; ValueError, KeyError or TypeError if it is not valid."""
        record = json.loads(text)
        if record["verdict"] not in STAGE_VERDICTS:
            raise ValueError(f"unknown verdict {record['verdict']!r}")
        return cls(record["verdict"], tuple(record["reasons"]), dict(record["figures"]), bool(record["used"]))


def newest_crop_s(collected: StageOutcome | None) -> float | None:
    """Capture time of a run's newest crop, from the outcome of `collect`; None = the run has no crops."""
    until_s = None if collected is None else collected.figures.get("until_s")
    return None if until_s is None else float(until_s)


def write_outcome(path: Path, outcome: StageOutcome) -> None:
    """Write an outcome atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (outcome.to_json() + "\n").encode())


def read_outcome(path: Path) -> StageOutcome | None:
    """The outcome of a stage; None = it has not ended.

    Raises:
        CycleError: the file is damaged.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        return StageOutcome.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise CycleError(f"{path} is damaged ({error}): remove it, and the stage will run again") from error


MAX_CHAIN = 3  # the active model and two predecessors, enough for two rollbacks


@dataclass(frozen=True)
class ActiveModel:
    """One model that is or was active.

    Attributes:
        model_id: its id on the server.
        bundle: its folder, as a path on this machine.
        checkpoint: where the next adaptation starts; empty = from the base weights.
        run: that created it; 0 = it existed before the first run.
        spaces: collections that were switched to it: name -> (previous space, its own space).
        previous: the model that was active before; None = unknown.
    """

    model_id: str
    bundle: str
    checkpoint: str = ""
    run: int = 0
    spaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    previous: ActiveModel | None = None

    def chain(self) -> Iterator[ActiveModel]:
        """This model and its predecessors, newest first."""
        model: ActiveModel | None = self
        while model is not None:
            yield model
            model = model.previous

    def shortened(self, length: int = MAX_CHAIN) -> ActiveModel:
        """With at most `length` models in the chain."""
        cut = None if self.previous is None or length < 2 else self.previous.shortened(length - 1)
        return replace(self, previous=cut)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ActiveModel:
        """From a record of `write_active`; KeyError, TypeError or ValueError if it is not valid."""
        previous = record["previous"]
        spaces = {str(name): (str(old), str(new)) for name, (old, new) in record["spaces"].items()}
        return cls(
            model_id=str(record["model_id"]),
            bundle=str(record["bundle"]),
            checkpoint=str(record["checkpoint"]),
            run=int(record["run"]),
            spaces=spaces,
            previous=None if previous is None else cls.from_json(previous),
        )


def read_active(path: Path) -> ActiveModel | None:
    """The active model and its chain; None = nothing was promoted yet.

    Raises:
        CycleError: the file is damaged.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CycleError(
            f"{path} is damaged ({error}): restore it, or move it away to start from the base weights"
        ) from error
    try:
        return ActiveModel.from_json(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CycleError(
            f"{path} is damaged ({error!r}): restore it, or move it away to start from the base weights"
        ) from error


def write_active(path: Path, active: ActiveModel) -> None:
    """Write the chain."""
    write_atomic(path, (json.dumps(asdict(active.shortened()), indent=2) + "\n").encode())
