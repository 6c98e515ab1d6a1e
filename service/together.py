"""Several awaited at once, where there are several."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What `asyncio.gather` answers. A lone one runs in its caller's task, which saves a turn of the loop."""
    return [await work[0]] if len(work) == 1 else await asyncio.gather(*work)
