"""What is promoted at a site, and what was before: `active.json`, written whole and at once.

The file holds a chain: the active model, the one it replaced, and the one before that. It is what a rollback goes
back along, and where the checkpoint of whatever model the server has active is looked up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from resight.atomic import write_atomic
from resight.errors import CycleError

KEPT = 3  # models of the chain: the active one, the one a rollback goes to, and one more for a second rollback


@dataclass(frozen=True)
class Active:
    """One model that is or was active.

    Attributes:
        model_id: its name on the server.
        bundle: its folder, as this machine sees it.
        checkpoint: what the next adaptation starts from; empty = from the base.
        run: that made it; 0 = it was there before the first one.
        spaces: collections that were switched to it: name -> (space before, its own).
        previous: what was active before; None = unknown.
    """

    model_id: str
    bundle: str
    checkpoint: str = ""
    run: int = 0
    spaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    previous: Active | None = None

    def chain(self) -> Iterator[Active]:
        """It, the one before, and so on."""
        one: Active | None = self
        while one is not None:
            yield one
            one = one.previous

    def shortened(self, length: int = KEPT) -> Active:
        """With so many of the chain at most."""
        cut = None if self.previous is None or length < 2 else self.previous.shortened(length - 1)
        return replace(self, previous=cut)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Active:
        """From what `write_active` wrote; KeyError, TypeError or ValueError where it is none."""
        before = told["previous"]
        spaces = {str(name): (str(was), str(now)) for name, (was, now) in told["spaces"].items()}
        fixed = (str(told["model_id"]), str(told["bundle"]), str(told["checkpoint"]), int(told["run"]))
        return cls(*fixed, spaces, None if before is None else cls.of(before))


def read_active(path: Path) -> Active | None:
    """The chain; None = nothing was promoted yet.

    Raises:
        CycleError: the file is damaged.
    """
    try:
        told = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CycleError(f"{path} is damaged ({error}): restore it, or move it away to begin from the base") from error
    try:
        return Active.of(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CycleError(
            f"{path} is damaged ({error!r}): restore it, or move it away to begin from the base"
        ) from error


def write_active(path: Path, active: Active) -> None:
    """Write the chain."""
    write_atomic(path, (json.dumps(asdict(active.shortened()), indent=2) + "\n").encode())
