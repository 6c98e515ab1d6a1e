"""The expected state after a process was killed: acknowledged writes, and each write in flight as a whole or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

State = dict[str, Any] | None
"""The expected state of an object; None = it must not exist."""
Write = Mapping[str, State]
"""Objects by name, with their states after one write."""


class Ledger:
    """The expected states of all objects by name."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}

    def acknowledge(self, write: Write) -> None:
        """Record an acknowledged write."""
        self.states |= write

    def reconcile(self, found: Mapping[str, State], in_flight: Iterable[Write]) -> None:
        """Check the states found after a crash, and continue from them.

        Args:
            found: the states of all existing objects.
            in_flight: writes without an acknowledgement; no two of them concern the same object.
        """
        for begun in in_flight:
            old = {name: self.states.get(name) for name in begun}
            now = {name: found.get(name) for name in begun}
            assert now in (old, dict(begun)), ("half of a write", now, old, begun)
            self.states |= now
        expected = {name: state for name, state in self.states.items() if state is not None}
        assert dict(found) == expected, describe_difference(found, expected)
        self.states = dict(expected)


def describe_difference(found: Mapping[str, State], expected: Mapping[str, State]) -> str:
    """The number of differences and the first five of them."""
    odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    lines = [f"{name}: found {found.get(name)}, expected {expected.get(name)}" for name in odd[:5]]
    return f"{len(odd)} of {len(expected)} differ; " + "; ".join(lines)
