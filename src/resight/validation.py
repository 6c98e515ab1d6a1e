"""What pydantic found wrong with settings, as one sentence for the person who wrote them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, ValidationError

STRICT = ConfigDict(strict=True, extra="forbid")  # of settings as dataclasses: no number from text, no unknown key
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of models and of dataclasses


@dataclass(frozen=True)
class Problem:
    """The first error of a validation.

    Attributes:
        kind: whether a required key is missing, a key is unknown or a value is wrong.
        key: where, such as ``camera[0].source``; empty for the whole.
        location: the same in parts.
        reason: of a wrong value: what was expected and what was found.
    """

    kind: Literal["missing", "unknown", "value"]
    key: str
    location: tuple[int | str, ...]
    reason: str


def first_problem(error: ValidationError) -> Problem:
    """The first error; of a value that fits no member of a union, what each member expects."""
    errors = error.errors()
    first = errors[0]
    key = dotted_key(first["loc"])
    if first["type"] == "missing":
        return Problem("missing", key, first["loc"], "")
    if first["type"] in UNKNOWN_KEY:
        return Problem("unknown", key, first["loc"], "")
    if first["type"] == "value_error":
        return Problem("value", key, first["loc"], str(first["msg"]).removeprefix("Value error, "))
    expected = [str(one["msg"]).removeprefix("Input should be ") for one in errors if dotted_key(one["loc"]) == key]
    return Problem("value", key, first["loc"], f"expected {' or '.join(expected)}, found {first['input']!r}")


def dotted_key(location: tuple[int | str, ...]) -> str:
    """A location as text, such as ``camera[0].source``, without the members of unions that pydantic adds."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier():
            text += f".{part}" if text else part
    return text


def suggestion(name: str, known: Iterable[str]) -> str:
    """Ask whether the nearest known name was meant; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
