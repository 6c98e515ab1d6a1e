"""Checkpoints, written by training and read by the exporters: a folder without pickles.

    model.safetensors       the encoder's state dict
    checkpoint.json         schema version, encoder config, recipe, epoch, provenance
    optimizer.safetensors   moments and step counts, only if training can be resumed

See docs/checkpoint.md.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from resight.encoder.model import Encoder, EncoderConfig
from resight.errors import CheckpointError
from resight.files import replace_folder, temporary_folder

SCHEMA_VERSION = 1
MODEL_FILE = "model.safetensors"
INDEX_FILE = "checkpoint.json"
RESUME_FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class Provenance:
    """The origin of a checkpoint's weights.

    Attributes:
        recipe: the recipe with every value resolved; empty for initial weights.
        stage: "initial", "teacher" or "student".
        epoch: last completed epoch, -1 before the first.
        store_fingerprint: `CropStore.fingerprint` of the crops trained on; empty for initial weights.
        initial_weights: name and sha256 of the file that training started from, and its licence if known.
        history: one mapping of metrics per epoch.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "initial"
    epoch: int = -1
    store_fingerprint: str = ""
    initial_weights: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """An encoder in eval mode and its provenance; ``resume`` holds the optimizer's state."""

    encoder: Encoder
    provenance: Provenance
    resume: Mapping[str, Tensor] = field(default_factory=dict)


def write_checkpoint(
    path: Path, encoder: Encoder, provenance: Provenance, *, resume: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        path: folder; an existing checkpoint is replaced.
        encoder: its state dict is stored as float32.
        provenance: see `Provenance`.
        resume: tensors to resume training from, by name.

    Raises:
        CheckpointError: ``path`` exists and is not a checkpoint.
    """
    if path.exists() and not (path / INDEX_FILE).is_file():
        raise CheckpointError(f"{path} exists and is not a checkpoint: choose another folder, or remove it")
    index = {
        "schema_version": SCHEMA_VERSION,
        "encoder": encoder.config.to_json(),
        "provenance": {**vars(provenance), "history": list(provenance.history)},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    with temporary_folder(path) as folder:
        (folder / MODEL_FILE).write_bytes(save(_plain(encoder.state_dict())))
        if resume:
            (folder / RESUME_FILE).write_bytes(save(_plain(resume)))
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, default=str) + "\n")
        replace_folder(folder, path)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies: safetensors rejects shared and strided storage."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def load_checkpoint(path: Path, *, device: str = "cpu") -> Checkpoint:
    """Read and check a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged files, a newer schema, or tensors that do not fit the encoder.
    """
    index = _read_index(path)
    try:
        config = EncoderConfig.from_json(index["encoder"])
        stored = index["provenance"]
        provenance = Provenance(**{**stored, "history": tuple(stored["history"])})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / INDEX_FILE} does not describe an encoder ({error}): export or adapt it again"
        ) from error
    encoder = Encoder(config)
    tensors = _read_tensors(path / MODEL_FILE)
    load_state(encoder, tensors, source=str(path / MODEL_FILE))
    resume = _read_tensors(path / RESUME_FILE) if (path / RESUME_FILE).exists() else {}
    return Checkpoint(encoder.eval().to(device), provenance, resume)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a checkpoint (it may still be damaged)."""
    return (path / INDEX_FILE).is_file()


def _read_index(path: Path) -> dict[str, Any]:
    """checkpoint.json of a known schema version."""
    try:
        index = json.loads((path / INDEX_FILE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: {INDEX_FILE} is missing; expected a folder `resight adapt` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / INDEX_FILE} cannot be read ({error}): the checkpoint is damaged") from error
    version = index.get("schema_version") if isinstance(index, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: use the resight that wrote it"
        )
    return dict(index)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): take the checkpoint from its source again") from error


def load_state(encoder: Encoder, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load tensors that must match the encoder's state dict exactly.

    Raises:
        CheckpointError: lists missing and unexpected tensors and wrong shapes.
    """
    expected = encoder.state_dict()
    problems = describe_mismatch(expected, tensors)
    if problems:
        raise CheckpointError(f"{source} does not hold a {encoder.config.backbone} encoder: {problems}")
    encoder.load_state_dict(dict(tensors))


def describe_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """List the first missing and unexpected tensors and wrong shapes; empty if all match."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in parts if names)


def _first(names: list[str], count: int = 4) -> str:
    """The first few names and the number of the others."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
