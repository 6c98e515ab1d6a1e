"""A person detector from an ONNX file: checking the graph, recognising its head, and running it with onnxruntime.

The file is untrusted. Unlike `resight.bundle.graph_check`, which accepts only graphs of our own exporters, this must
accept graphs of many exporters. It requires that the graph is self-contained (no external files), uses only ONNX's
own operators and no control flow (loops, branches, functions), does not configure onnxruntime, and that no value
implied by its shapes is too large.

The head is recognised by the graph's inputs and outputs, not by the name of the file:

    YOLO v5   (1, N, 5 + C)   centre x, centre y, width, height, objectness, C class scores
    YOLO v8   (1, 4 + C, N)   centre x, centre y, width, height, C class scores
    SSD       boxes (N, 4), labels (N), scores (N), after non-maximum suppression

YOLO's boxes are in pixels of the input; an SSD's in pixels or in fractions of it.

Letters: N boxes, C classes, H and W of the frame.
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

PAD_GREY = 114  # letterbox borders, as in YOLO training
NMS_IOU = 0.7  # boxes that overlap more are one person: v8's value; v5's 0.45 loses people behind others
MAX_BOXES = 2**20  # rows of an output; a v5 of 1280 pixels has 102,000
YOLO_PERSON = 0  # index in COCO's 80 classes, as numbered by YOLO
END_TO_END = 1000  # maximum rows of heads with built-in NMS; they have six columns, as v5 with one class


def letterbox(image: Pixels, size: tuple[int, int]) -> tuple[Pixels, float, float, float]:
    """Fit a frame into a canvas, keeping its aspect ratio, with grey borders.

    Args:
        image: uint8 (H, W, 3).
        size: H and W of the canvas.

    Returns:
        The canvas; the scale from frame to canvas; the left and upper border in pixels.
    """
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas = np.full((*size, 3), PAD_GREY, np.uint8)
    small = Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(small)
    return canvas, scale, float(left), float(top)


def read_yolo(output: NDArray[Any], person: int) -> tuple[Doubles, Doubles]:
    """People in the output of a v5 or v8 head, after non-maximum suppression.

    Args:
        output: (1, N, 5 + C) or (1, 4 + C, N), with or without the batch dimension.
        person: index of the person class.

    Returns:
        float64 (N, 4) xyxy in pixels of the input, and float64 (N,) scores.

    Raises:
        DetectorError: another shape, or too few classes.
    """
    rows = output[0] if output.ndim == 3 and len(output) == 1 else output
    if rows.ndim != 2 or min(rows.shape) < 5 or max(rows.shape) > MAX_BOXES:
        raise DetectorError(f"expected a YOLO head (1, N, 5 + C) or (1, 4 + C, N), found an output {output.shape}")
    version_8 = rows.shape[0] < rows.shape[1]
    if not version_8 and rows.shape[1] == 6 and len(rows) <= END_TO_END:
        raise DetectorError(
            f"an output {output.shape} may be a head with built-in suppression or a YOLO v5 with one class: "
            "export the model without NMS in its graph"
        )
    table = (rows.T if version_8 else rows).astype(np.float64)  # (N, 4 + C) or (N, 5 + C)
    classes = table[:, 4:] if version_8 else table[:, 5:] * table[:, 4:5]
    if not version_8 and table.shape[1] == 5:
        classes = table[:, 4:]  # a single class without a separate score
    if person >= classes.shape[1]:
        raise DetectorError(f"the head has {classes.shape[1]} classes, but the person class is number {person}")
    scores = classes[:, person]
    likely = np.flatnonzero((scores >= MIN_SCORE) & (classes.argmax(1) == person) & np.isfinite(table[:, :4]).all(1))
    centre, sides = table[likely, :2], table[likely, 2:4]
    xyxy, scores = np.concatenate([centre - sides / 2, centre + sides / 2], 1), scores[likely].clip(0, 1)
    selected = nms(torch.from_numpy(xyxy), torch.from_numpy(scores), NMS_IOU).numpy()
    return xyxy[selected], scores[selected]


def read_ssd(
    boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any], size: tuple[int, int], *, rows_first: bool
) -> tuple[Doubles, Doubles]:
    """People in the output of an SSD.

    Args:
        boxes: (N, 4), with or without a batch dimension of 1; in pixels, or in fractions of the input if no value
            exceeds 2, since no person fits in two pixels.
        labels: (N,), likewise.
        scores: (N,), likewise.
        size: H and W of the input.
        rows_first: top, left, bottom, right instead of left, top, right, bottom.

    Returns:
        float64 (N, 4) xyxy in fractions of the input, and float64 (N,) scores.

    Raises:
        DetectorError: the lengths differ.
    """
    xyxy, classes, confidence = boxes.reshape(-1, 4).astype(np.float64), labels.reshape(-1), scores.reshape(-1)
    if not len(xyxy) == len(classes) == len(confidence) <= MAX_BOXES:
        raise DetectorError(
            f"expected an SSD's boxes, labels and scores, found {boxes.shape, labels.shape, scores.shape}"
        )
    if rows_first:
        xyxy = xyxy[:, [1, 0, 3, 2]]
    if np.abs(xyxy).max(initial=0) > 2:
        xyxy = xyxy / [size[1], size[0], size[1], size[0]]
    keep = (classes.astype(np.int64) == COCO_PERSON) & (confidence >= MIN_SCORE) & np.isfinite(xyxy).all(1)
    return xyxy[keep], confidence[keep].astype(np.float64).clip(0, 1)


def person_class(names: str) -> int:
    """Index of the class "person" from the class names in the metadata; COCO's if there are none."""
    try:
        parsed = ast.literal_eval(names[:65536])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return YOLO_PERSON
    named = dict(enumerate(parsed)) if isinstance(parsed, list | tuple) else parsed if isinstance(parsed, dict) else {}
    found = [number for number, name in named.items() if str(name).lower() in ("person", "pedestrian", "people")]
    return int(found[0]) if found and isinstance(found[0], int) and found[0] >= 0 else YOLO_PERSON


FLOAT_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16}
INTEGER_TYPES = {TensorProto.INT64, TensorProto.INT32}

HeadKind = Literal["yolo", "ssd"]
ValueShape = tuple[int | None, ...]


@dataclass(frozen=True)
class DetectorHead:
    """Inputs and outputs of a detector's graph.

    Attributes:
        kind: "yolo" (one tensor of boxes and class scores) or "ssd" (boxes, labels and scores).
        input: name of its input.
        planes: whether the input is (…, 3, H, W) instead of (…, H, W, 3).
        batched: whether the input has a batch dimension.
        dtype: numpy name of the input's type: "float32", "float16" or "uint8".
        size: H and W of the input; None if it is free.
        outputs: names of the outputs: one tensor, or boxes, labels and scores.
        rows_first: whether an SSD's boxes are top, left, bottom, right (TensorFlow) instead of left, top, ….
        names: class names in the metadata, as written by the exporter; empty if there are none.
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
    """Recognise the head of a graph.

    Raises:
        DetectorError: its inputs and outputs match no supported head.
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
    """The fields planes, batched, dtype and size of a head."""
    kinds: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}
    kind, shape = value.type.tensor_type.elem_type, value_shape(value)
    lengths = shape[1:] if len(shape) == 4 else shape
    if kind not in kinds or len(lengths) != 3 or (len(shape) == 4 and shape[0] not in (None, 0, 1)):
        refuse_graph("an image (1, 3, H, W) or (1, H, W, 3) of float32, float16 or uint8", (value.name, kind, shape))
    if 3 not in (lengths[0], lengths[2]):
        refuse_graph("three colour channels in the input's shape", shape)
    planes = lengths[0] == 3
    height, width = lengths[1:] if planes else lengths[:2]
    fixed = (height, width) if height and width else None
    if fixed is not None and not all(16 <= side <= MAX_SIDE for side in fixed):
        refuse_graph(f"an image of 16 to {MAX_SIDE} pixels per side", fixed)
    return planes, len(shape) == 4, kinds[kind], fixed


def _ssd_outputs(outputs: Mapping[str, tuple[int, ValueShape]]) -> tuple[str, str, str]:
    """Names of boxes, labels and scores, by shape and type, or by name if all are float (TensorFlow)."""
    rank = max(
        len(shape) for _, shape in outputs.values()
    )  # 2, or 3 with a batch dimension; labels and scores have one less
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
    if len(scores) > 1:  # num_detections can be float too
        scores = [name for name in scores if any(word in name.lower() for word in ("score", "conf"))]
    labels = [name for name in labels if not name.lower().split(":")[0].endswith("num_detections")]
    if not len(boxes) == len(labels) == len(scores) == 1:
        refuse_graph("an SSD head: boxes (N, 4), labels (N) and scores (N)", dict(outputs))
    return boxes[0], labels[0], scores[0]


def refuse_graph(expected: str, found: object) -> NoReturn:
    """Raise an error with the expected and the found property of a graph.

    Raises:
        DetectorError: always.
    """
    raise DetectorError(f"expected {expected}, found {str(found)[:200]!r}")


def value_shape(value: ValueInfoProto) -> ValueShape:
    """The shape of a value, with None for free dimensions; () if it is unknown."""
    lengths = value.type.tensor_type.shape.dim
    return tuple(length.dim_value if length.HasField("dim_value") else None for length in lengths)


OPSETS = range(11, 27)  # YOLO exporters write 11 to 22; onnxruntime supports all of these
MAX_NODES = 16_384  # a two-stage detector exported by torch has about 3000
MAX_ELEMENTS = 2**28  # of one value: 1 GB of float32, a feature map of 4096 x 4096 x 16
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
HARMLESS_FIELDS = frozenset({"TensorProto.data_location"})  # allowed with its default value: inside the file
ORT_SETTING = "ort_"  # metadata that would configure onnxruntime's session


def read_head(data: bytes, *, label: str) -> DetectorHead:
    """Check a graph and recognise its head.

    Args:
        data: a serialised ONNX model.
        label: name used in messages.

    Raises:
        DetectorError: the graph is refused, or its inputs and outputs match no supported head.
    """
    try:
        model, _ = read_structure(data)
        _check_fields(model)
        _check_header(model)
        _check_sizes(model)
        return recognise_head(model)
    except Exception as error:  # on malformed files protobuf and onnx raise errors without a common base class
        message = str(error) if isinstance(error, ReIDError) else f"expected a valid ONNX model, found: {error}"
        shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split())[:500])
        raise DetectorError(
            f"{label} was refused before running it: {shown}: export it with one input, a YOLO (v5, v8) or SSD "
            "head, and internal weights"
        ) from error


def _check_fields(message: Message) -> None:
    """Refuse control flow and external files at any depth of the model."""
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
        refuse_graph("only ONNX's own operators", f"operators of {', '.join(sorted(used))}")
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        refuse_graph(f"one opset of {OPSETS[0]} to {OPSETS[-1]}", versions)
    settings = [entry.key for entry in model.metadata_props if entry.key.startswith(ORT_SETTING)]
    if settings:
        refuse_graph("no settings of onnxruntime in its metadata", settings)
    if len(model.graph.node) > MAX_NODES:
        refuse_graph(f"at most {MAX_NODES} nodes", len(model.graph.node))


def _check_sizes(model: ModelProto) -> None:
    """Bound the sizes implied by shapes before onnxruntime folds constants; input-dependent dimensions are ignored."""
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


FREE_SIDE = 640  # input side for YOLO graphs of free size, as in training of v5 and v8
STRIDE = 32  # coarsest grid of both; a free size is a multiple of it


class OnnxDetector:
    """A detector run by onnxruntime.

    Args:
        path: the ONNX file.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        DetectorError: the file cannot be read, is refused, or onnxruntime cannot run it.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        try:
            data = _read_graph_file(path)
        except OSError as error:
            raise DetectorError(f"{path} cannot be read ({error.strerror}): expected an ONNX file") from error
        self._head, self._name = read_head(data, label=str(path)), str(path)
        self._person = person_class(self._head.names) if self._head.kind == "yolo" else COCO_PERSON
        self.identity: Mapping[str, str] = {"detector": "onnx", "weights_sha256": hashlib.sha256(data).hexdigest()}
        self._session = _open_graph(data, device, label=str(path))

    def find(self, frame: Frame) -> Boxes:
        """Boxes in pixels, clipped to the frame; see `Detector.find`.

        Raises:
            DetectorError: the graph fails, or its output does not match the head.
        """
        height, width = frame.image.shape[:2]
        size = self._size(height, width)
        if self._head.kind == "yolo":
            canvas, scale, left, top = letterbox(frame.image, size)
            xyxy, scores = read_yolo(self._run(canvas)[0], self._person)
            xyxy = (xyxy - [left, top, left, top]) / scale
        else:
            canvas = np.asarray(Image.fromarray(frame.image).resize(size[::-1], Image.Resampling.BILINEAR))
            fractions, scores = self._read_ssd(size)(*self._run(canvas))
            xyxy = fractions * [width, height, width, height]
        return make_boxes(xyxy, scores).within(height, width)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """H and W of the input: the graph's; if free, the frame's for an SSD and a long side of 640 for YOLO."""
        if self._head.size is not None:
            return self._head.size
        if self._head.kind == "ssd":
            return height, width
        scale = FREE_SIDE / max(height, width)
        return tuple(max(STRIDE, -(-round(side * scale) // STRIDE) * STRIDE) for side in (height, width))  # type: ignore[return-value]  # two sides

    def _run(self, canvas: Pixels) -> list[NDArray[Any]]:
        """Run the graph on an image uint8 (H, W, 3)."""
        head = self._head
        image: NDArray[Any] = canvas if head.dtype == "uint8" else (canvas / np.float32(255)).astype(head.dtype)
        image = np.ascontiguousarray(image.transpose(2, 0, 1) if head.planes else image)
        try:
            found = self._session.run(list(head.outputs), {head.input: image[None] if head.batched else image})
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise DetectorError(f"{self._name} failed on a frame: {str(error).splitlines()[0][:300]}") from error
        return list(found)

    def _read_ssd(self, size: tuple[int, int]) -> Any:
        def read(boxes: NDArray[Any], labels: NDArray[Any], scores: NDArray[Any]) -> tuple[Doubles, Doubles]:
            return read_ssd(boxes, labels, scores, size, rows_first=self._head.rows_first)

        return read


def _read_graph_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_GRAPH_BYTES + 1)


def _open_graph(data: bytes, device: str, *, label: str) -> Any:
    """An onnxruntime session; CUDA needs the GPU wheel."""
    try:
        import onnxruntime as ort

        from resight.runtime.onnx import open_session, session_options
    except ImportError as error:
        raise DetectorError("an ONNX detector needs onnxruntime: install resight[cpu] or resight[gpu]") from error
    try:
        if not device.startswith("cuda"):
            return open_session(data, torch.get_num_threads())
        provider = "CUDAExecutionProvider"
        number = int(device.partition(":")[2] or 0)
        session = ort.InferenceSession(data, session_options(1), providers=[(provider, {"device_id": number})])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise DetectorError(f"onnxruntime refuses {label}: {str(error).splitlines()[0][:300]}") from error
    if provider not in session.get_providers():
        raise DetectorError(f"onnxruntime cannot use {device}: install resight[gpu], or use --device cpu")
    return session
