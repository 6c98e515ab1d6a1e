"""Ingesting a video into a store, in this process or in one that is killed: `ingesting.py kill|read ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from resight.training.ingest import pipeline
from resight.training.ingest import pipeline as module
from resight.training.ingest.boxes import BoxFile
from resight.training.ingest.pipeline import IngestJournal, SourceResult, ingest
from resight.training.ingest.sources import open_footage
from resight.training.store import growing
from resight.training.store.growing import GrowingStore

KILL_POINTS: dict[str, tuple[Any, str, bool]] = {
    "file": (GrowingStore, "_write", False),
    "file-written": (GrowingStore, "_write", True),
    "index": (growing, "write_table", False),
    "index-written": (growing, "write_table", True),
    "journal": (pipeline.IngestJournal, "advance", False),
    "journal-written": (pipeline.IngestJournal, "advance", True),
    "frame": (module._SourceReader, "_process", False),
}
COMMIT_S = 6.0  # of footage; the default is longer than the test videos


def read(
    folder: Path, root: Path, *, boxes: str = "door.jsonl", name: str = "door.mp4", camera: str = "door", **more: Any
) -> SourceResult:
    store = GrowingStore(root)
    with IngestJournal(root) as opened:
        footage = open_footage(str(folder / name), camera=camera, fps=5)
        return ingest(footage, BoxFile(folder / boxes, 5), store, opened, **more)


def kill_at(step: str, count: int) -> None:
    """Kill this process at the given call of a step, before or after its work."""
    owner, name, after = KILL_POINTS[step]
    real, calls = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)


def main() -> None:
    what, folder, root, *rest = sys.argv[1:]
    if what == "read":
        read(Path(folder), Path(root), boxes=f"{rest[0]}.jsonl", name=f"{rest[0]}.mp4", camera=rest[0])
        return
    module.COMMIT_S = COMMIT_S
    for where in rest:  # forks of a process that has imported everything and started no threads
        child = os.fork()
        if not child:
            step, _, count = where.partition(":")
            kill_at(step, int(count))
            read(Path(folder), Path(root) / where)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (where, status)


if __name__ == "__main__":
    main()
