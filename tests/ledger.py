"""What must be there after a process was killed: what was answered, and of what was in flight all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

State = dict[str, Any] | None
"""What a thing must be, in words of the storm; None = it must not be there."""
Write = Mapping[str, State]
"""Things by name, with what one write makes of them."""


class Ledger:
    """The states of all things by name."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}

    def answered(self, write: Write) -> None:
        """A write was answered: it holds."""
        self.states |= write

    def settle(self, found: Mapping[str, State], in_flight: Iterable[Write]) -> None:
        """Compare with what is there, and go on from it.

        Args:
            found: everything that is there.
            in_flight: writes that were begun and not answered, each of them of things no other one touches.
        """
        for begun in in_flight:
            old = {name: self.states.get(name) for name in begun}
            now = {name: found.get(name) for name in begun}
            assert now in (old, dict(begun)), ("half of a write", now, old, begun)
            self.states |= now
        must = {name: state for name, state in self.states.items() if state is not None}
        assert dict(found) == must, difference(found, must)
        self.states = dict(must)


def difference(found: Mapping[str, State], must: Mapping[str, State]) -> str:
    """In few words: a thousand entries are no message."""
    odd = sorted(name for name in {*found, *must} if found.get(name) != must.get(name))
    lines = [f"{name}: found {found.get(name)}, expected {must.get(name)}" for name in odd[:5]]
    return f"{len(odd)} of {len(must)} differ; " + "; ".join(lines)
