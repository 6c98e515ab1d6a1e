"""The state of a training run: settings, progress and metric logs (JSONL, TensorBoard), optimizer and schedule."""

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

CONSOLE_METRICS = ("loss", "clusters", "outlier_share", "eps", "nmi", "links", "links_violated", "images_per_s")


class RunLog:
    """Context manager that logs the metrics of each epoch and shows progress.

    Files are opened when the first metrics are written, so a refused run does not overwrite an earlier one.

    Args:
        folder: receives `epochs.jsonl`, the labels and TensorBoard's event files; created if missing.
        console: shows progress and one line per epoch.
        append: keep the lines of an earlier part of the same run.
        silent: write nothing, because another process of the same run does.
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
                earlier.unlink()  # TensorBoard would plot both runs as one
        board: SummaryWriter = self._opened.enter_context(SummaryWriter(str(self._folder)))
        return board

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar while the context is open; yields the function that advances it."""
        task = self._progress.add_task(description, total=total)
        try:
            yield lambda done: self._progress.advance(task, done)
        finally:
            self._progress.remove_task(task)

    def labels(self, stage: str, labels: NDArray[np.int64]) -> None:
        """Write the latest labels of a stage to `<stage>-labels.npy`, row i for crop i, -1 for outliers."""
        if not self._silent:
            np.save(self._folder / f"{stage}-labels.npy", labels)

    def epoch(self, stage: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one epoch to the JSONL file, to TensorBoard and to the console."""
        if self._silent:
            return
        self._file.write(json.dumps({"stage": stage, "epoch": epoch, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(f"{stage}/{name}", value, epoch)
        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in CONSOLE_METRICS if name in metrics)
        self._progress.console.print(f"[bold]{stage}[/bold] epoch {epoch:>2}  {shown}", highlight=False)


Stage = Literal["teacher", "student"]
STAGES: tuple[Stage, ...] = ("teacher", "student")


@dataclass(frozen=True)
class TrainingRun:
    """What is constant during a run: the crops, the recipe and the environment.

    Attributes:
        store: the N crops; row i is sample i in features, labels and batches.
        recipe: the method and its settings.
        seed: seed of all random streams.
        device: "cpu", "cuda" or "cuda:N".
        log: receives metrics and progress.
        pixels: cache of decoded crops.
        links: must-links and cannot-links between rows of the store, which clusters satisfy.
    """

    store: CropStore
    recipe: Recipe
    seed: int
    device: str
    log: RunLog
    pixels: PixelCache = field(default_factory=PixelCache)
    links: Links | None = None

    def random_streams(self, stage: Stage, epoch: int) -> tuple[np.random.Generator, ...]:
        """Independent generators for the sampler, flips and shifts (used in a thread), erasing and the objective."""
        seeds = np.random.SeedSequence([self.seed, STAGES.index(stage), epoch + 1]).spawn(4)
        return tuple(np.random.default_rng(seed) for seed in seeds)


def require_finite(encoder: Encoder, description: str) -> None:
    """Refuse weights that are not finite: the last step can diverge although its loss was finite.

    Raises:
        TrainingError: names the first tensors with NaN or infinity.
    """
    broken = [name for name, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{description}: {len(broken)} tensors are not finite ({', '.join(broken[:3])}): start from valid weights, "
            "lower lr in the recipe, or set precision to fp32; the last epoch's checkpoint is intact"
        )


WARMUP_START = 0.01  # O2CAP's linear warm-up starts at a hundredth of the rate


def make_optimizer(encoder: Encoder, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all trainable parameters (the bias of a neck is frozen, see `Head`)."""
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def learning_rate(recipe: Recipe, round_: int) -> float:
    """Learning rate of the n-th round of a stage, n from 0.

    As StepLR in LP's code, which also steps after the student's epoch -1 (round 0 here): with 50 epochs and steps at
    0.4 and 0.8 the rate drops before rounds 20 and 40. O2CAP's warm-up is linear.
    """
    decays = sum(round_ >= round(step * recipe.epochs) for step in recipe.lr_steps)
    warmup = WARMUP_START + (1 - WARMUP_START) * round_ / recipe.warmup if round_ < recipe.warmup else 1.0
    return recipe.lr * warmup * recipe.lr_decay**decays


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, round_: int) -> float:
    """Apply `learning_rate` and return it."""
    value = learning_rate(recipe, round_)
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


@dataclass
class StageState:
    """What changes during a stage: the model, and the epoch with the tensors carried over from the previous one.

    Attributes:
        stage: "teacher" or "student".
        encoder: trained in place.
        optimizer: over the encoder's parameters.
        teacher: the frozen teacher, when a student is trained.
        epoch: from 0, or -1 for a student's first epoch.
        carried: tensors that persist between epochs: the last labels, the banks of selective contrast.
    """

    stage: Stage
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    teacher: Teacher | None = None
    epoch: int = 0
    carried: dict[str, Tensor] = field(default_factory=dict)

    @property
    def uses_teacher_labels(self) -> bool:
        """Whether labels and centroids come from the teacher (LP, section 3.6 of methods as released)."""
        return self.epoch < 0

    def __str__(self) -> str:
        return f"{self.stage} epoch {self.epoch}"
