"""What a run tells while it goes on: progress bars, a JSONL file and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

LINE = ("loss", "clusters", "outlier_share", "eps", "nmi", "links", "links_violated", "images_per_s")


class RunLog:
    """A context in which epochs and progress are reported.

    Files are opened at the first figures, so that a run that is refused leaves those of an earlier one alone.

    Args:
        folder: receives `epochs.jsonl`, the labels and TensorBoard's event files; made if missing.
        console: where progress and one line an epoch go.
        append: keep the lines of an earlier part of the same run.
        silent: write nothing: another process of the same run does.
    """

    def __init__(self, folder: Path, *, console: Console, append: bool = False, silent: bool = False) -> None:
        if not silent:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._append, self._silent = folder, append, silent
        self._opened = ExitStack()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=silent,
        )

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._opened.close()

    @cached_property
    def _file(self) -> TextIO:
        path = self._folder / "epochs.jsonl"
        return self._opened.enter_context(path.open("a" if self._append else "w", buffering=1))

    @cached_property
    def _board(self) -> SummaryWriter:
        if not self._append:
            for earlier in self._folder.glob("events.out.tfevents.*"):
                earlier.unlink()  # TensorBoard would draw both runs as one
        board: SummaryWriter = self._opened.enter_context(SummaryWriter(str(self._folder)))
        return board

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar that goes away at the end; yields the function that moves it on."""
        task = self._progress.add_task(what, total=total)
        try:
            yield lambda done: self._progress.advance(task, done)
        finally:
            self._progress.remove_task(task)

    def labels(self, stage: str, labels: NDArray[np.int64]) -> None:
        """Keep the last labels of a stage as `<stage>-labels.npy`, row i for crop i, -1 for outliers."""
        if not self._silent:
            np.save(self._folder / f"{stage}-labels.npy", labels)

    def epoch(self, stage: str, epoch: int, figures: Mapping[str, float]) -> None:
        """Write one epoch's figures everywhere."""
        if self._silent:
            return
        self._file.write(json.dumps({"stage": stage, "epoch": epoch, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{stage}/{name}", value, epoch)
        shown = "  ".join(f"{name} {figures[name]:.4g}" for name in LINE if name in figures)
        self._progress.console.print(f"[bold]{stage}[/bold] epoch {epoch:>2}  {shown}", highlight=False)
