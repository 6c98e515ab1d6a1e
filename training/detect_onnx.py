"""A person detector given as an ONNX file: letterbox, run, and read a YOLO or SSD head.

The heads, told apart by the graph's outputs (`resight.training.detector_graph`):

    YOLO v5   (1, N, 5 + C)   centre x, centre y, width, height, whether anything is there, C class scores
    YOLO v8   (1, 4 + C, N)   centre x, centre y, width, height, C class scores
    SSD       boxes (N, 4), labels (N), scores (N), after their own suppression

YOLO's boxes are pixels of its input, an SSD's too or shares of it. Letters: N boxes, C classes, H and W of the frame.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import nms

from resight.errors import DetectorError
from resight.graph_bytes import MAX_BYTES
from resight.image import Pixels
from resight.training.boxes import Boxes, make_boxes
from resight.training.detect import LEAST_SCORE, PERSON
from resight.training.detector_graph import read_head
from resight.training.footage import Frame

Floats = NDArray[np.float64]

SIDE = 640  # pixels that a YOLO graph of free size is asked with: what v5 and v8 were trained at
STRIDE = 32  # the coarsest grid of both; a free size is a multiple of it
GREY = 114  # of the letterbox's borders, as both are trained
SUPPRESS_IOU = 0.7  # boxes that overlap more are one person: v8's own; v5's 0.45 loses who stands behind somebody
MAX_BOXES = 2**20  # rows of an answer; a v5 of 1280 pixels has 102,000
YOLO_PERSON = 0  # of COCO's 80 classes, as YOLO counts them
END_TO_END = 1000  # rows at most of the heads that suppress by themselves; such have six columns, as v5 of one class


class OnnxDetector:
    """A graph in onnxruntime.

    Args:
        path: of the file.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        DetectorError: the file cannot be read, is refused, or onnxruntime cannot run it.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        try:
            data = _read(path)
        except OSError as error:
            raise DetectorError(f"{path} cannot be read ({error.strerror}): expected an ONNX file") from error
        self._head, self._name = read_head(data, what=str(path)), str(path)
        self._person = _person_class(self._head.names) if self._head.kind == "yolo" else PERSON
        self.identity: Mapping[str, str] = {"detector": "onnx", "weights_sha256": hashlib.sha256(data).hexdigest()}
        self._session = _open(data, device, what=str(path))

    def find(self, frame: Frame) -> Boxes:
        """Float boxes in pixels, cut to the frame; see `Detector.find`.

        Raises:
            DetectorError: the graph fails, or answers what is no head of its kind.
        """
        height, width = frame.image.shape[:2]
        size = self._size(height, width)
        if self._head.kind == "yolo":
            canvas, scale, left, top = letterbox(frame.image, size)
            xyxy, scores = read_yolo(self._run(canvas)[0], self._person)
            xyxy = (xyxy - [left, top, left, top]) / scale
        else:
            canvas = np.asarray(Image.fromarray(frame.image).resize(size[::-1], Image.Resampling.BILINEAR))
            shares, scores = self._read_ssd(size)(*self._run(canvas))
            xyxy = shares * [width, height, width, height]
        return make_boxes(xyxy, scores).within(height, width)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """H and W of what the graph is asked with: its own, or for a free one the frame's, a YOLO's long side 640."""
        if self._head.size is not None:
            return self._head.size
        if self._head.kind == "ssd":
            return height, width
        shrink = SIDE / max(height, width)
        return tuple(max(STRIDE, -(-round(side * shrink) // STRIDE) * STRIDE) for side in (height, width))  # type: ignore[return-value]  # two sides

    def _run(self, canvas: Pixels) -> list[NDArray[Any]]:
        """Ask the graph with uint8 (H, W, 3)."""
        head = self._head
        image: NDArray[Any] = canvas if head.dtype == "uint8" else (canvas / np.float32(255)).astype(head.dtype)
        image = np.ascontiguousarray(image.transpose(2, 0, 1) if head.planes else image)
        try:
            found = self._session.run(list(head.outputs), {head.input: image[None] if head.batched else image})
        except Exception as error:  # onnxruntime's own exceptions have no common root
            raise DetectorError(f"{self._name} failed on a frame: {str(error).splitlines()[0][:300]}") from error
        return list(found)

    def _read_ssd(self, size: tuple[int, int]) -> Any:
        def read(boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any]) -> tuple[Floats, Floats]:
            return read_ssd(boxes, labels, scores, size, rows_first=self._head.rows_first)

        return read


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


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _person_class(names: str) -> int:
    """The number of the class "person" where the exporter wrote the names of the classes; else COCO's."""
    try:
        said = ast.literal_eval(names[:65536])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return YOLO_PERSON
    named = dict(enumerate(said)) if isinstance(said, list | tuple) else said if isinstance(said, dict) else {}
    found = [number for number, name in named.items() if str(name).lower() in ("person", "pedestrian", "people")]
    return int(found[0]) if found and isinstance(found[0], int) and found[0] >= 0 else YOLO_PERSON


def _open(data: bytes, device: str, *, what: str) -> Any:
    """A session of onnxruntime; the wheel for GPUs holds CUDA's provider."""
    try:
        import onnxruntime as ort

        from resight.cpu_session import open_session, session_options
    except ImportError as error:
        raise DetectorError("an ONNX detector needs onnxruntime: install resight[cpu] or resight[gpu]") from error
    try:
        if not device.startswith("cuda"):
            return open_session(data, torch.get_num_threads())
        wanted = "CUDAExecutionProvider"
        number = int(device.partition(":")[2] or 0)
        session = ort.InferenceSession(data, session_options(1), providers=[(wanted, {"device_id": number})])
    except Exception as error:  # onnxruntime's own exceptions have no common root
        raise DetectorError(f"onnxruntime refuses {what}: {str(error).splitlines()[0][:300]}") from error
    if wanted not in session.get_providers():
        raise DetectorError(f"onnxruntime cannot use {device} here: install resight[gpu], or take --device cpu")
    return session
