"""Which head a detector's graph has, told by its inputs and outputs, never by its file's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from onnx import ModelProto, TensorProto, ValueInfoProto

from resight.errors import DetectorError
from resight.image import MAX_SIDE

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
INTEGERS = {TensorProto.INT64, TensorProto.INT32}

Kind = Literal["yolo", "ssd"]
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Head:
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

    kind: Kind
    input: str
    planes: bool
    batched: bool
    dtype: str
    size: tuple[int, int] | None
    outputs: tuple[str, ...]
    rows_first: bool
    names: str


def recognise(model: ModelProto) -> Head:
    """Tell the head of a graph.

    Raises:
        DetectorError: its inputs and outputs are of no detector that is known.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        refuse("one input, the image", [value.name for value in inputs])
    planes, batched, dtype, size = _input(inputs[0])
    outputs = {value.name: (value.type.tensor_type.elem_type, shape_of(value)) for value in model.graph.output}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if len(outputs) == 1:
        ((name, (kind, shape)),) = outputs.items()
        if kind not in FLOATS or len(shape) not in (0, 2, 3):
            refuse("a YOLO head: one float output (1, 4 + C, N) or (1, N, 5 + C)", (kind, shape))
        return Head("yolo", inputs[0].name, planes, batched, dtype, size, (name,), False, metadata.get("names", ""))
    boxes, labels, scores = _ssd_outputs(outputs)
    rows_first = boxes.lower().split(":")[0].endswith("detection_boxes")  # TensorFlow's object detection API
    return Head("ssd", inputs[0].name, planes, batched, dtype, size, (boxes, labels, scores), rows_first, "")


def _input(value: ValueInfoProto) -> tuple[bool, bool, str, tuple[int, int] | None]:
    """Whether planes come first, whether there is a batch, the type, and the size."""
    kinds: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}
    kind, shape = value.type.tensor_type.elem_type, shape_of(value)
    lengths = shape[1:] if len(shape) == 4 else shape
    if kind not in kinds or len(lengths) != 3 or (len(shape) == 4 and shape[0] not in (None, 0, 1)):
        refuse("an image (1, 3, H, W) or (1, H, W, 3) of float32, float16 or uint8", (value.name, kind, shape))
    if 3 not in (lengths[0], lengths[2]):
        refuse("three colours in the input's shape", shape)
    planes = lengths[0] == 3
    height, width = lengths[1:] if planes else lengths[:2]
    fixed = (height, width) if height and width else None
    if fixed is not None and not all(16 <= side <= MAX_SIDE for side in fixed):
        refuse(f"an image of 16 to {MAX_SIDE} pixels a side", fixed)
    return planes, len(shape) == 4, kinds[kind], fixed


def _ssd_outputs(outputs: Mapping[str, tuple[int, Shape]]) -> tuple[str, str, str]:
    """Names of boxes, labels and scores, by shape and type, and by name where TensorFlow makes all of them float."""
    rank = max(len(shape) for _, shape in outputs.values())  # 2, or 3 with a batch; labels and scores have less
    boxes = [
        name
        for name, (kind, shape) in outputs.items()
        if (kind in FLOATS, len(shape), shape[-1:]) == (True, rank, (4,))
    ]
    rest = {name: kind for name, (kind, shape) in outputs.items() if 1 <= len(shape) < rank}
    labels = [name for name, kind in rest.items() if kind in INTEGERS]
    if not labels:
        labels = [name for name in rest if any(word in name.lower() for word in ("class", "label"))]
    scores = [name for name, kind in rest.items() if kind in FLOATS and name not in labels]
    if len(scores) > 1:  # num_detections is a float as well
        scores = [name for name in scores if any(word in name.lower() for word in ("score", "conf"))]
    labels = [name for name in labels if not name.lower().split(":")[0].endswith("num_detections")]
    if not len(boxes) == len(labels) == len(scores) == 1:
        refuse("an SSD head: boxes (N, 4), labels (N) and scores (N)", dict(outputs))
    return boxes[0], labels[0], scores[0]


def refuse(expected: str, found: object) -> NoReturn:
    """Tell what was expected of a graph and what was found.

    Raises:
        DetectorError: always.
    """
    raise DetectorError(f"expected {expected}, found {str(found)[:200]!r}")


def shape_of(value: ValueInfoProto) -> Shape:
    """The lengths of a value, None for one that is free; () where nothing is said."""
    lengths = value.type.tensor_type.shape.dim
    return tuple(length.dim_value if length.HasField("dim_value") else None for length in lengths)
