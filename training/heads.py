"""The heads of ONNX detectors: how a picture is handed in, and what the answer says.

The heads, told apart by the graph's outputs (`resight.training.detector_head`):

    YOLO v5   (1, N, 5 + C)   centre x, centre y, width, height, whether anything is there, C class scores
    YOLO v8   (1, 4 + C, N)   centre x, centre y, width, height, C class scores
    SSD       boxes (N, 4), labels (N), scores (N), after their own suppression

YOLO's boxes are pixels of its input, an SSD's too or shares of it. Letters: N boxes, C classes, H and W of the frame.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import nms

from resight.errors import DetectorError
from resight.image import Pixels
from resight.training.boxes import Floats
from resight.training.detect import LEAST_SCORE, PERSON

GREY = 114  # of the letterbox's borders, as both are trained
SUPPRESS_IOU = 0.7  # boxes that overlap more are one person: v8's own; v5's 0.45 loses who stands behind somebody
MAX_BOXES = 2**20  # rows of an answer; a v5 of 1280 pixels has 102,000
YOLO_PERSON = 0  # of COCO's 80 classes, as YOLO counts them
END_TO_END = 1000  # rows at most of the heads that suppress by themselves; such have six columns, as v5 of one class


def letterbox(image: Pixels, size: tuple[int, int]) -> tuple[Pixels, float, float, float]:
    """Fit a frame into a canvas with its shape kept and grey around it.

    Args:
        image: uint8 (H, W, 3).
        size: H and W of the canvas.

    Returns:
        The canvas; pixels of it for one of the frame; its left and upper border in pixels.
    """
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas = np.full((*size, 3), GREY, np.uint8)
    small = Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(small)
    return canvas, scale, float(left), float(top)


def read_yolo(answer: NDArray[Any], person: int) -> tuple[Floats, Floats]:
    """People in the answer of a v5 or v8 head, after suppression.

    Args:
        answer: (1, N, 5 + C) or (1, 4 + C, N), with or without the first length.
        person: number of the class.

    Returns:
        float64 (N, 4) xyxy in pixels of the input, and float64 (N,) scores.

    Raises:
        DetectorError: another shape, not so many classes, or numbers that are none.
    """
    rows = answer[0] if answer.ndim == 3 and len(answer) == 1 else answer
    if rows.ndim != 2 or min(rows.shape) < 5 or max(rows.shape) > MAX_BOXES:
        raise DetectorError(f"expected a YOLO head (1, N, 5 + C) or (1, 4 + C, N), found an answer {answer.shape}")
    version_8 = rows.shape[0] < rows.shape[1]
    if not version_8 and rows.shape[1] == 6 and len(rows) <= END_TO_END:
        raise DetectorError(
            f"an answer {answer.shape} may be a head that suppresses by itself or a YOLO v5 of one class: export the "
            "model without suppression in its graph"
        )
    table = (rows.T if version_8 else rows).astype(np.float64)  # (N, 4 + C) or (N, 5 + C)
    classes = table[:, 4:] if version_8 else table[:, 5:] * table[:, 4:5]
    if not version_8 and table.shape[1] == 5:
        classes = table[:, 4:]  # one class that has no score of its own
    if person >= classes.shape[1]:
        raise DetectorError(f"the head has {classes.shape[1]} classes, and people are number {person}: not its head")
    scores = classes[:, person]
    likely = np.flatnonzero((scores >= LEAST_SCORE) & (classes.argmax(1) == person) & np.isfinite(table[:, :4]).all(1))
    centre, sides = table[likely, :2], table[likely, 2:4]
    xyxy, scores = np.concatenate([centre - sides / 2, centre + sides / 2], 1), scores[likely].clip(0, 1)
    kept = nms(torch.from_numpy(xyxy), torch.from_numpy(scores), SUPPRESS_IOU).numpy()
    return xyxy[kept], scores[kept]


def read_ssd(
    boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any], size: tuple[int, int], *, rows_first: bool
) -> tuple[Floats, Floats]:
    """People in the answer of an SSD.

    Args:
        boxes: (N, 4), with or without a length of 1 before it; pixels of the input, or shares of it: where none
            exceeds 2 they are shares, for nobody is found in two pixels.
        labels: (N,) likewise.
        scores: (N,) likewise.
        size: H and W of the input.
        rows_first: top, left, bottom, right instead of left, top, right, bottom.

    Returns:
        float64 (N, 4) xyxy in shares of the input, and float64 (N,) scores.

    Raises:
        DetectorError: the three do not fit together.
    """
    xyxy, kinds, sure = boxes.reshape(-1, 4).astype(np.float64), labels.reshape(-1), scores.reshape(-1)
    if not len(xyxy) == len(kinds) == len(sure) <= MAX_BOXES:
        raise DetectorError(
            f"expected an SSD's boxes, labels and scores, found {boxes.shape, labels.shape, scores.shape}"
        )
    if rows_first:
        xyxy = xyxy[:, [1, 0, 3, 2]]
    if np.abs(xyxy).max(initial=0) > 2:
        xyxy = xyxy / [size[1], size[0], size[1], size[0]]
    keep = (kinds.astype(np.int64) == PERSON) & (sure >= LEAST_SCORE) & np.isfinite(xyxy).all(1)
    return xyxy[keep], sure[keep].astype(np.float64).clip(0, 1)


def person_class(names: str) -> int:
    """The number of the class "person" where the exporter wrote the names of the classes; else COCO's."""
    try:
        said = ast.literal_eval(names[:65536])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return YOLO_PERSON
    named = dict(enumerate(said)) if isinstance(said, list | tuple) else said if isinstance(said, dict) else {}
    found = [number for number, name in named.items() if str(name).lower() in ("person", "pedestrian", "people")]
    return int(found[0]) if found and isinstance(found[0], int) and found[0] >= 0 else YOLO_PERSON
