"""The heads of ONNX detectors: how a picture is handed in, and what the answer says.

The heads, told apart by the graph's outputs (`resight.training.ingest.onnx_detector`):

    YOLO v5   (1, N, 5 + C)   centre x, centre y, width, height, whether anything is there, C class scores
    YOLO v8   (1, 4 + C, N)   centre x, centre y, width, height, C class scores
    SSD       boxes (N, 4), labels (N), scores (N), after their own suppression

YOLO's boxes are pixels of its input, an SSD's too or shares of it. Letters: N boxes, C classes, H and W of the frame.

Which head a detector's graph has, told by its inputs and outputs, never by its file's name.

A person detector's ONNX file is hostile until this has read it.

`resight.bundle.graph_check` lets nothing pass that our exporters do not write; detectors come from many exporters, so
of a detector only this is asked: it is self-contained (no file beside it is read), has none but ONNX's own operators
and no programs within it (loops, branches, functions), sets nothing of onnxruntime, and no constant that its shapes
imply is out of proportion. And its head is one of those `resight.training.ingest.onnx_detector` can read.

A person detector given as an ONNX file, run by onnxruntime. Letters: N boxes, H and W of the frame.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import onnx
import torch
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto
from PIL import Image
from torchvision.ops import nms

from resight.arrays import Doubles, Pixels
from resight.bundle.graph_check import MAX_GRAPH_BYTES, read_structure
from resight.errors import DetectorError, ReIDError
from resight.image import MAX_SIDE
from resight.training.ingest.boxes import COCO_PERSON, MIN_SCORE, Boxes, make_boxes
from resight.training.ingest.footage import Frame

PAD_GREY = 114  # of the letterbox's borders, as both are trained
NMS_IOU = 0.7  # boxes that overlap more are one person: v8's own; v5's 0.45 loses who stands behind somebody
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
    canvas = np.full((*size, 3), PAD_GREY, np.uint8)
    small = Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(small)
    return canvas, scale, float(left), float(top)


def read_yolo(answer: NDArray[Any], person: int) -> tuple[Doubles, Doubles]:
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
    likely = np.flatnonzero((scores >= MIN_SCORE) & (classes.argmax(1) == person) & np.isfinite(table[:, :4]).all(1))
    centre, sides = table[likely, :2], table[likely, 2:4]
    xyxy, scores = np.concatenate([centre - sides / 2, centre + sides / 2], 1), scores[likely].clip(0, 1)
    kept = nms(torch.from_numpy(xyxy), torch.from_numpy(scores), NMS_IOU).numpy()
    return xyxy[kept], scores[kept]


def read_ssd(
    boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any], size: tuple[int, int], *, rows_first: bool
) -> tuple[Doubles, Doubles]:
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
    keep = (kinds.astype(np.int64) == COCO_PERSON) & (sure >= MIN_SCORE) & np.isfinite(xyxy).all(1)
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


FLOAT_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16}
INTEGER_TYPES = {TensorProto.INT64, TensorProto.INT32}

HeadKind = Literal["yolo", "ssd"]
ValueShape = tuple[int | None, ...]


@dataclass(frozen=True)
class DetectorHead:
    """How a graph is asked and what it answers.

    Attributes:
        kind: "yolo" (one tensor of boxes and class scores) or "ssd" (boxes, labels and scores).
        input: name of its one input.
        planes: whether it takes (…, 3, H, W) rather than (…, H, W, 3).
        batched: whether the input has a first length for the batch.
        dtype: numpy's name of the input's type: "float32", "float16" or "uint8".
        size: H and W it takes; None = any.
        outputs: names: the tensor; or boxes, labels, scores.
        rows_first: whether an SSD's boxes are top, left, bottom, right (TensorFlow) rather than left, top, ….
        names: metadata of the classes' names, as the exporter wrote it; empty where it did not.
    """

    kind: HeadKind
    input: str
    planes: bool
    batched: bool
    dtype: str
    size: tuple[int, int] | None
    outputs: tuple[str, ...]
    rows_first: bool
    names: str


def recognise_head(model: ModelProto) -> DetectorHead:
    """Tell the head of a graph.

    Raises:
        DetectorError: its inputs and outputs are of no detector that is known.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        refuse_graph("one input, the image", [value.name for value in inputs])
    planes, batched, dtype, size = _read_input(inputs[0])
    outputs = {value.name: (value.type.tensor_type.elem_type, value_shape(value)) for value in model.graph.output}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if len(outputs) == 1:
        ((name, (kind, shape)),) = outputs.items()
        if kind not in FLOAT_TYPES or len(shape) not in (0, 2, 3):
            refuse_graph("a YOLO head: one float output (1, 4 + C, N) or (1, N, 5 + C)", (kind, shape))
        return DetectorHead(
            "yolo", inputs[0].name, planes, batched, dtype, size, (name,), False, metadata.get("names", "")
        )
    boxes, labels, scores = _ssd_outputs(outputs)
    rows_first = boxes.lower().split(":")[0].endswith("detection_boxes")  # TensorFlow's object detection API
    return DetectorHead("ssd", inputs[0].name, planes, batched, dtype, size, (boxes, labels, scores), rows_first, "")


def _read_input(value: ValueInfoProto) -> tuple[bool, bool, str, tuple[int, int] | None]:
    """Whether planes come first, whether there is a batch, the type, and the size."""
    kinds: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}
    kind, shape = value.type.tensor_type.elem_type, value_shape(value)
    lengths = shape[1:] if len(shape) == 4 else shape
    if kind not in kinds or len(lengths) != 3 or (len(shape) == 4 and shape[0] not in (None, 0, 1)):
        refuse_graph("an image (1, 3, H, W) or (1, H, W, 3) of float32, float16 or uint8", (value.name, kind, shape))
    if 3 not in (lengths[0], lengths[2]):
        refuse_graph("three colours in the input's shape", shape)
    planes = lengths[0] == 3
    height, width = lengths[1:] if planes else lengths[:2]
    fixed = (height, width) if height and width else None
    if fixed is not None and not all(16 <= side <= MAX_SIDE for side in fixed):
        refuse_graph(f"an image of 16 to {MAX_SIDE} pixels a side", fixed)
    return planes, len(shape) == 4, kinds[kind], fixed


def _ssd_outputs(outputs: Mapping[str, tuple[int, ValueShape]]) -> tuple[str, str, str]:
    """Names of boxes, labels and scores, by shape and type, and by name where TensorFlow makes all of them float."""
    rank = max(len(shape) for _, shape in outputs.values())  # 2, or 3 with a batch; labels and scores have less
    boxes = [
        name
        for name, (kind, shape) in outputs.items()
        if (kind in FLOAT_TYPES, len(shape), shape[-1:]) == (True, rank, (4,))
    ]
    rest = {name: kind for name, (kind, shape) in outputs.items() if 1 <= len(shape) < rank}
    labels = [name for name, kind in rest.items() if kind in INTEGER_TYPES]
    if not labels:
        labels = [name for name in rest if any(word in name.lower() for word in ("class", "label"))]
    scores = [name for name, kind in rest.items() if kind in FLOAT_TYPES and name not in labels]
    if len(scores) > 1:  # num_detections is a float as well
        scores = [name for name in scores if any(word in name.lower() for word in ("score", "conf"))]
    labels = [name for name in labels if not name.lower().split(":")[0].endswith("num_detections")]
    if not len(boxes) == len(labels) == len(scores) == 1:
        refuse_graph("an SSD head: boxes (N, 4), labels (N) and scores (N)", dict(outputs))
    return boxes[0], labels[0], scores[0]


def refuse_graph(expected: str, found: object) -> NoReturn:
    """Tell what was expected of a graph and what was found.

    Raises:
        DetectorError: always.
    """
    raise DetectorError(f"expected {expected}, found {str(found)[:200]!r}")


def value_shape(value: ValueInfoProto) -> ValueShape:
    """The lengths of a value, None for one that is free; () where nothing is said."""
    lengths = value.type.tensor_type.shape.dim
    return tuple(length.dim_value if length.HasField("dim_value") else None for length in lengths)


OPSETS = range(11, 27)  # YOLO exporters write 11 to 22; onnxruntime runs all of these
MAX_NODES = 16_384  # a detector of two stages as torch exports it has about 3000
MAX_ELEMENTS = 2**28  # of one value: 1 GB of float; a feature map of 4096 x 4096 x 16 has as many
FORBIDDEN_FIELDS = {
    "AttributeProto": {
        "g",
        "graphs",
        "tensors",
        "sparse_tensor",
        "sparse_tensors",
        "ref_attr_name",
        "tp",
        "type_protos",
    },
    "TensorProto": {"external_data", "data_location"},
    "ModelProto": {"functions", "training_info"},
    "GraphProto": {"sparse_initializer"},
}
HARMLESS_FIELDS = frozenset({"TensorProto.data_location"})  # where it says what is the default: within the file
ORT_SETTING = "ort_"  # metadata by which a file would set onnxruntime's session


def read_head(data: bytes, *, what: str) -> DetectorHead:
    """Refuse a hostile graph, and recognise the head of another.

    Args:
        data: a serialised ONNX model.
        what: how messages name it.

    Raises:
        DetectorError: it is refused, or its inputs and outputs are of no detector that is known.
    """
    try:
        model, _ = read_structure(data)
        _check_fields(model)
        _check_header(model)
        _check_sizes(model)
        return recognise_head(model)
    except Exception as error:  # on hostile bytes protobuf and onnx raise classes of many kinds, with no common root
        told = str(error) if isinstance(error, ReIDError) else f"expected a valid ONNX model, found: {error}"
        shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(told.split())[:500])
        raise DetectorError(
            f"{what} was refused before anything ran it: {shown}: export it with one input, a YOLO (v5, v8) or SSD "
            "head, and weights inside"
        ) from error


def _check_fields(message: Message) -> None:
    """Refuse programs within the graph and files beside it, wherever they are named."""
    name = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        if field.name in FORBIDDEN_FIELDS.get(name, ()) and (f"{name}.{field.name}" not in HARMLESS_FIELDS or value):
            refuse_graph("a self-contained graph without loops, branches or functions", f"{field.name} in {name}")
        if field.message_type is not None:
            for part in value if isinstance(value, Iterable) else [value]:
                _check_fields(part)


def _check_header(model: ModelProto) -> None:
    used = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if used:
        refuse_graph("ONNX's own operators alone", f"operators of {', '.join(sorted(used))}")
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        refuse_graph(f"one opset of {OPSETS[0]} to {OPSETS[-1]}", versions)
    settings = [entry.key for entry in model.metadata_props if entry.key.startswith(ORT_SETTING)]
    if settings:
        refuse_graph("no settings of onnxruntime in its metadata", settings)
    if len(model.graph.node) > MAX_NODES:
        refuse_graph(f"at most {MAX_NODES} nodes", len(model.graph.node))


def _check_sizes(model: ModelProto) -> None:
    """Bound what shapes imply before onnxruntime folds constants; lengths that depend on the input stay open."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    large = [
        tensor for tensor in skeleton.graph.initializer if not tensor.ByteSize() or _element_count(tensor.dims) > 256
    ]
    for tensor in large:
        skeleton.graph.initializer.remove(tensor)
        skeleton.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, data_prop=True)
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        known = [length for length in value_shape(value) if length is not None]
        if _element_count(known) > MAX_ELEMENTS:
            refuse_graph(f"at most {MAX_ELEMENTS} elements of {value.name!r}", known)


def _element_count(lengths: Iterable[int]) -> int:
    return math.prod(lengths)


FREE_SIDE = 640  # pixels that a YOLO graph of free size is asked with: what v5 and v8 were trained at
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
            data = _read_graph_file(path)
        except OSError as error:
            raise DetectorError(f"{path} cannot be read ({error.strerror}): expected an ONNX file") from error
        self._head, self._name = read_head(data, what=str(path)), str(path)
        self._person = person_class(self._head.names) if self._head.kind == "yolo" else COCO_PERSON
        self.identity: Mapping[str, str] = {"detector": "onnx", "weights_sha256": hashlib.sha256(data).hexdigest()}
        self._session = _open_graph(data, device, what=str(path))

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
        shrink = FREE_SIDE / max(height, width)
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
        def read(boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any]) -> tuple[Doubles, Doubles]:
            return read_ssd(boxes, labels, scores, size, rows_first=self._head.rows_first)

        return read


def _read_graph_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_GRAPH_BYTES + 1)


def _open_graph(data: bytes, device: str, *, what: str) -> Any:
    """A session of onnxruntime; the wheel for GPUs holds CUDA's provider."""
    try:
        import onnxruntime as ort

        from resight.runtime.onnx import open_session, session_options
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
