"""Static INT8 forms of a serving graph: which blocks stay in float, and whether the form may enter a bundle.

Both are decided by measuring on crops that took no part in the calibration. See `resight.exporters.qdq` for how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.exporters.qdq import Calibrated, apply, run

MAX_TRIED = 32  # crops a block is judged by; only an order of blocks hangs on it
Progress = Callable[[str], None]
"""Called with what begins."""


@dataclass(frozen=True)
class Gate:
    """What an INT8 form must hold to enter a bundle.

    Attributes:
        min_mean_cosine: mean cosine similarity to fp32 on held-back crops, at least.
        max_map_loss: mAP, 0..1, that may be lost against fp32.
        min_speedup: throughput against fp32 on this machine, at least.
    """

    min_mean_cosine: float = 0.98
    max_map_loss: float = 0.01
    min_speedup: float = 1.0


@dataclass(frozen=True, eq=False)
class Quantised:
    """An INT8 form and how near it is to fp32 on crops it was not calibrated on.

    Attributes:
        model: serialised ONNX, QDQ.
        kept: blocks left in float, the most sensitive first.
        mean_cosine: of the features of the two forms.
        min_cosine: the worst crop's.
        crops: how many were compared.
    """

    model: bytes
    kept: tuple[str, ...]
    mean_cosine: float
    min_cosine: float
    crops: int


def keep_sensitive(
    calibrated: Calibrated, *, symmetric: bool = False, gate: Gate | None = None, progress: Progress | None = None
) -> Quantised:
    """Make an INT8 form, with blocks kept in float only where the gate asks for it.

    If all of it in INT8 is near enough, nothing is kept. Else each block alone is put in INT8 to see what it costs,
    and the 1, 2, 4, ... costliest are kept until the gate is met, nothing gains any more, or half of the blocks are
    in float: with more there would be nothing left of the speed. So at most B + log2(B) + 1 forms of B blocks are
    tried (OSNet 11, ResNet-18 9, ResNet-50 17), each for a second or three.

    Args:
        calibrated: one calibration serves both forms.
        symmetric: for TensorRT.
        gate: whose `min_mean_cosine` is aimed at.
        progress: told what begins.
    """
    wanted = (gate or Gate()).min_mean_cosine
    best = _measure(calibrated, symmetric, ())
    if best.mean_cosine >= wanted:
        return best
    costs = {}
    for block in calibrated.blocks:
        if progress is not None:
            progress(f"trying {block}")
        costs[block] = _cost(calibrated, symmetric, block)
    order = sorted(costs, key=lambda block: (-costs[block], block))
    count = 1
    while best.mean_cosine < wanted and count <= len(order) // 2:
        if progress is not None:
            progress(f"keeping {count} blocks in float")
        found = _measure(calibrated, symmetric, tuple(order[:count]))
        if found.mean_cosine <= best.mean_cosine:
            break
        best = found
        count *= 2
    return best


def _measure(calibrated: Calibrated, symmetric: bool, keep: tuple[str, ...]) -> Quantised:
    """A form and its cosines on the crops held back."""
    model = apply(calibrated, symmetric=symmetric, keep=keep)
    cosines = _cosines(run(model, calibrated.held_back), calibrated.features)
    return Quantised(model, keep, float(cosines.mean()), float(cosines.min()), len(cosines))


def _cost(calibrated: Calibrated, symmetric: bool, block: str) -> float:
    """What one block alone in INT8 takes from the mean cosine."""
    others = [other for other in calibrated.blocks if other != block]
    model = apply(calibrated, symmetric=symmetric, keep=others)
    crops = calibrated.held_back[:MAX_TRIED]
    return 1.0 - float(_cosines(run(model, crops), calibrated.features[: len(crops)]).mean())


def _cosines(features: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row; what is not a number is as wrong as can be."""
    cosines: NDArray[np.float64] = (features.astype(np.float64) * wanted).sum(1)
    return np.nan_to_num(cosines, nan=-1.0)


def decide(
    gate: Gate,
    *,
    mean_cosine: float,
    map_before: float | None = None,
    map_after: float | None = None,
    speedup: float | None = None,
) -> str:
    """Say why an INT8 form may not enter the bundle.

    Args:
        gate: what is asked of it.
        mean_cosine: to fp32, on crops it was not calibrated on.
        map_before: mAP of fp32, 0..1; None where no labelled set was given.
        map_after: mAP of the form.
        speedup: its throughput against fp32's on this machine; None where that must not decide, because the form is
            meant for another machine or was asked for by name.

    Returns:
        The reason with its figures; empty: it may enter.
    """
    if not mean_cosine >= gate.min_mean_cosine:
        return f"mean cosine to fp32 {mean_cosine:.4f} on crops not calibrated on, under {gate.min_mean_cosine}"
    if map_before is not None and map_after is not None:
        lost = map_before - map_after
        if not lost <= gate.max_map_loss + 1e-9:  # 0.50 less 0.49 is a trifle more than 0.01 in binary
            return (
                f"mAP {100 * map_after:.1f} against {100 * map_before:.1f} of fp32: {100 * lost:.1f} lost, "
                f"more than {100 * gate.max_map_loss:g}"
            )
    if speedup is not None and not speedup >= gate.min_speedup:
        return f"{speedup:.2f} of the speed of fp32 on this machine, under {gate.min_speedup:g}"
    return ""
