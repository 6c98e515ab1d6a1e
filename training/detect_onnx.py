"""A person detector given as an ONNX file, run by onnxruntime. Letters: N boxes, H and W of the frame."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from resight.errors import DetectorError
from resight.graph_bytes import MAX_BYTES
from resight.image import Pixels
from resight.training.boxes import Boxes, Floats, make_boxes
from resight.training.detect import PERSON
from resight.training.detector_graph import read_head
from resight.training.footage import Frame
from resight.training.heads import letterbox, person_class, read_ssd, read_yolo

SIDE = 640  # pixels that a YOLO graph of free size is asked with: what v5 and v8 were trained at
STRIDE = 32  # the coarsest grid of both; a free size is a multiple of it


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
        self._person = person_class(self._head.names) if self._head.kind == "yolo" else PERSON
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


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


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
