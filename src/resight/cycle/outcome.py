"""What a stage came to, in a file that is written as the stage's last act."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from resight.atomic import write_atomic
from resight.errors import CycleError

Verdict = Literal["done", "skipped", "refused", "rolled_back"]
VERDICTS = ("done", "skipped", "refused", "rolled_back")


@dataclass(frozen=True)
class Outcome:
    """Of one stage of one run.

    Attributes:
        verdict: done = the run goes on; the others end it.
        reasons: in words, with the figures.
        figures: plain values, for the history and for later stages.
        used: the run's crops were looked at and are not counted as new again, though the run ends here.
    """

    verdict: Verdict = "done"
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    used: bool = False

    def to_json(self) -> str:
        """As text."""
        return json.dumps({**vars(self), "reasons": list(self.reasons)}, indent=2, default=str)

    @classmethod
    def of(cls, text: str) -> Outcome:
        """From `to_json`; ValueError, KeyError or TypeError where it is none."""
        told = json.loads(text)
        if told["verdict"] not in VERDICTS:
            raise ValueError(f"verdict {told['verdict']!r}")
        return cls(told["verdict"], tuple(told["reasons"]), dict(told["figures"]), bool(told["used"]))


def until_s(collected: Outcome | None) -> float | None:
    """Capture time of a run's newest crop, as its `collect` told; None = it has none."""
    found = None if collected is None else collected.figures.get("until_s")
    return None if found is None else float(found)


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Write it whole and at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (outcome.to_json() + "\n").encode())


def read_outcome(path: Path) -> Outcome | None:
    """What a stage came to; None = it has not ended.

    Raises:
        CycleError: the file is damaged.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        return Outcome.of(text)
    except (ValueError, KeyError, TypeError) as error:
        raise CycleError(f"{path} is damaged ({error}): remove it, and the stage is done again") from error
