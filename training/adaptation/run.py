"""The state of a run: settings, progress bars, logs (JSONL, TensorBoard), and the optimizer with its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from resight.encoder.model import Encoder
from resight.errors import TrainingError
from resight.training.adaptation.distill import Teacher
from resight.training.adaptation.recipe import Recipe
from resight.training.features.extract import PixelCache
from resight.training.store.crops import CropStore
from resight.training.store.links import Links

CONSOLE_FIGURES = ("loss", "clusters", "outlier_share", "eps", "nmi", "links", "links_violated", "images_per_s")


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
        shown = "  ".join(f"{name} {figures[name]:.4g}" for name in CONSOLE_FIGURES if name in figures)
        self._progress.console.print(f"[bold]{stage}[/bold] epoch {epoch:>2}  {shown}", highlight=False)


Stage = Literal["teacher", "student"]
STAGES: tuple[Stage, ...] = ("teacher", "student")


@dataclass(frozen=True)
class TrainingRun:
    """A method on a store.

    Attributes:
        store: the N crops; row i is sample i in features, labels and batches.
        recipe: the method.
        seed: of every stream of chance.
        device: "cpu", "cuda" or "cuda:N".
        log: where figures and progress go.
        pixels: crops read so far.
        links: between rows of the store: clusters obey them.
    """

    store: CropStore
    recipe: Recipe
    seed: int
    device: str
    log: RunLog
    pixels: PixelCache = field(default_factory=PixelCache)
    links: Links | None = None

    def chance(self, stage: Stage, epoch: int) -> tuple[np.random.Generator, ...]:
        """Independent streams for the sampler, for pixels (drawn in a thread), for erasing and for the objective."""
        seeds = np.random.SeedSequence([self.seed, STAGES.index(stage), epoch + 1]).spawn(4)
        return tuple(np.random.default_rng(seed) for seed in seeds)


def require_finite(encoder: Encoder, what: str) -> None:
    """Refuse weights that have run away; one more step can spoil them after a loss that was still finite.

    Raises:
        TrainingError: names the first tensors that hold NaN or infinity.
    """
    broken = [name for name, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{what}: {len(broken)} tensors are not finite ({', '.join(broken[:3])}): start from sound weights, lower "
            "lr in the recipe, or set precision to fp32; the last epoch's checkpoint stands"
        )


WARMUP_START = 0.01  # O2CAP's linear warm-up begins at a hundredth of the rate


def make_optimizer(encoder: Encoder, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over everything that learns (necks keep their bias frozen, see `Head`)."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def learning_rate(recipe: Recipe, round_: int) -> float:
    """Learning rate of the n-th round of a stage, n from 0.

    StepLR of LP's code: it also steps after the student's round -1, which is round 0 here, so with 50
    epochs and steps at 0.4 and 0.8 the rate drops before rounds 20 and 40. O2CAP's warm-up grows linearly.
    """
    drops = sum(round_ >= round(step * recipe.epochs) for step in recipe.lr_steps)
    grown = WARMUP_START + (1 - WARMUP_START) * round_ / recipe.warmup if round_ < recipe.warmup else 1.0
    return recipe.lr * grown * recipe.lr_decay**drops


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, round_: int) -> float:
    """Apply `learning_rate` and return it."""
    value = learning_rate(recipe, round_)
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


@dataclass(frozen=True)
class TrainState:
    """Who is trained, and by whom.

    Attributes:
        encoder: trained in place.
        optimizer: of its parameters.
        guide: a student's teacher.
    """

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    guide: Teacher | None = None


@dataclass
class EpochState:
    """An epoch of a stage, and what it takes over from the one before.

    Attributes:
        stage: names the stream of chance and the progress bar.
        epoch: from 0, or -1 for a student's first round.
        kept: tensors that live from epoch to epoch: the last labels, the banks of selective contrast.
    """

    stage: Stage
    epoch: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def borrowed(self) -> bool:
        """Whether labels and centroids are the teacher's (LP, section 3.6 of methods as released)."""
        return self.epoch < 0

    def __str__(self) -> str:
        return f"{self.stage} epoch {self.epoch}"
