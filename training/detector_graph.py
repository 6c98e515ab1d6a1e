"""A person detector's ONNX file is hostile until this has read it.

`resight.graph_check` lets nothing pass that our exporters do not write; detectors come from many exporters, so of a
detector only this is asked: it is self-contained (no file beside it is read), has none but ONNX's own operators and no
programs within it (loops, branches, functions), sets nothing of onnxruntime, and no constant that its shapes imply is
out of proportion. And its head is one of those `resight.training.detect_onnx` can read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

import onnx
from google.protobuf.message import Message
from onnx import ModelProto, TensorProto

from resight.errors import DetectorError, ReIDError
from resight.graph_bytes import read_structure
from resight.image import MAX_SIDE

OPSETS = range(11, 27)  # YOLO exporters write 11 to 22; onnxruntime runs all of these
MAX_NODES = 16_384  # a detector of two stages as torch exports it has about 3000
MAX_ELEMENTS = 2**28  # of one value: 1 GB of float; a feature map of 4096 x 4096 x 16 has as many
FORBIDDEN = {
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
HARMLESS = frozenset({"TensorProto.data_location"})  # where it says what is the default: within the file
SETTING = "ort_"  # metadata by which a file would set onnxruntime's session
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


def read_head(data: bytes, *, what: str) -> Head:
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
        return _recognise(model)
    except Exception as error:  # on hostile bytes protobuf and onnx raise classes of many kinds, with no common root
        told = str(error) if isinstance(error, ReIDError) else f"expected a valid ONNX model, found: {error}"
        shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(told.split())[:500])
        raise DetectorError(
            f"{what} was refused before anything ran it: {shown}: export it with one input, a YOLO (v5, v8) or SSD "
            "head, and weights inside"
        ) from error


def _refuse(expected: str, found: object) -> NoReturn:
    raise DetectorError(f"expected {expected}, found {str(found)[:200]!r}")


def _check_fields(message: Message) -> None:
    """Refuse programs within the graph and files beside it, wherever they are named."""
    name = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        if field.name in FORBIDDEN.get(name, ()) and (f"{name}.{field.name}" not in HARMLESS or value):
            _refuse("a self-contained graph without loops, branches or functions", f"{field.name} in {name}")
        if field.message_type is not None:
            for part in value if isinstance(value, Iterable) else [value]:
                _check_fields(part)


def _check_header(model: ModelProto) -> None:
    used = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if used:
        _refuse("ONNX's own operators alone", f"operators of {', '.join(sorted(used))}")
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        _refuse(f"one opset of {OPSETS[0]} to {OPSETS[-1]}", versions)
    settings = [entry.key for entry in model.metadata_props if entry.key.startswith(SETTING)]
    if settings:
        _refuse("no settings of onnxruntime in its metadata", settings)
    if len(model.graph.node) > MAX_NODES:
        _refuse(f"at most {MAX_NODES} nodes", len(model.graph.node))


def _check_sizes(model: ModelProto) -> None:
    """Bound what shapes imply before onnxruntime folds constants; lengths that depend on the input stay open."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    large = [tensor for tensor in skeleton.graph.initializer if not tensor.ByteSize() or _elements(tensor.dims) > 256]
    for tensor in large:
        skeleton.graph.initializer.remove(tensor)
        skeleton.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, data_prop=True)
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        known = [length for length in _shape(value) if length is not None]
        if _elements(known) > MAX_ELEMENTS:
            _refuse(f"at most {MAX_ELEMENTS} elements of {value.name!r}", known)


def _elements(lengths: Iterable[int]) -> int:
    return math.prod(lengths)


def _shape(value: onnx.ValueInfoProto) -> Shape:
    lengths = value.type.tensor_type.shape.dim
    return tuple(length.dim_value if length.HasField("dim_value") else None for length in lengths)


def _recognise(model: ModelProto) -> Head:
    """Tell the head by the graph's inputs and outputs, never by its file's name."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        _refuse("one input, the image", [value.name for value in inputs])
    planes, batched, dtype, size = _input(inputs[0])
    outputs = {value.name: (value.type.tensor_type.elem_type, _shape(value)) for value in model.graph.output}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if len(outputs) == 1:
        ((name, (kind, shape)),) = outputs.items()
        if kind not in FLOATS or len(shape) not in (0, 2, 3):
            _refuse("a YOLO head: one float output (1, 4 + C, N) or (1, N, 5 + C)", (kind, shape))
        return Head("yolo", inputs[0].name, planes, batched, dtype, size, (name,), False, metadata.get("names", ""))
    boxes, labels, scores = _ssd_outputs(outputs)
    rows_first = boxes.lower().split(":")[0].endswith("detection_boxes")  # TensorFlow's object detection API
    return Head("ssd", inputs[0].name, planes, batched, dtype, size, (boxes, labels, scores), rows_first, "")


def _input(value: onnx.ValueInfoProto) -> tuple[bool, bool, str, tuple[int, int] | None]:
    """Whether planes come first, whether there is a batch, the type, and the size."""
    kinds: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}
    kind, shape = value.type.tensor_type.elem_type, _shape(value)
    lengths = shape[1:] if len(shape) == 4 else shape
    if kind not in kinds or len(lengths) != 3 or (len(shape) == 4 and shape[0] not in (None, 0, 1)):
        _refuse("an image (1, 3, H, W) or (1, H, W, 3) of float32, float16 or uint8", (value.name, kind, shape))
    if 3 not in (lengths[0], lengths[2]):
        _refuse("three colours in the input's shape", shape)
    planes = lengths[0] == 3
    height, width = lengths[1:] if planes else lengths[:2]
    fixed = (height, width) if height and width else None
    if fixed is not None and not all(16 <= side <= MAX_SIDE for side in fixed):
        _refuse(f"an image of 16 to {MAX_SIDE} pixels a side", fixed)
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
        _refuse("an SSD head: boxes (N, 4), labels (N) and scores (N)", dict(outputs))
    return boxes[0], labels[0], scores[0]
