"""A person detector's ONNX file is hostile until this has read it.

`resight.graph_check` lets nothing pass that our exporters do not write; detectors come from many exporters, so of a
detector only this is asked: it is self-contained (no file beside it is read), has none but ONNX's own operators and no
programs within it (loops, branches, functions), sets nothing of onnxruntime, and no constant that its shapes imply is
out of proportion. And its head is one of those `resight.training.detect_onnx` can read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx
from google.protobuf.message import Message
from onnx import ModelProto

from resight.errors import DetectorError, ReIDError
from resight.graph_bytes import read_structure
from resight.training.detector_head import Head, recognise, refuse, shape_of

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
        return recognise(model)
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
        if field.name in FORBIDDEN.get(name, ()) and (f"{name}.{field.name}" not in HARMLESS or value):
            refuse("a self-contained graph without loops, branches or functions", f"{field.name} in {name}")
        if field.message_type is not None:
            for part in value if isinstance(value, Iterable) else [value]:
                _check_fields(part)


def _check_header(model: ModelProto) -> None:
    used = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if used:
        refuse("ONNX's own operators alone", f"operators of {', '.join(sorted(used))}")
    versions = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        refuse(f"one opset of {OPSETS[0]} to {OPSETS[-1]}", versions)
    settings = [entry.key for entry in model.metadata_props if entry.key.startswith(SETTING)]
    if settings:
        refuse("no settings of onnxruntime in its metadata", settings)
    if len(model.graph.node) > MAX_NODES:
        refuse(f"at most {MAX_NODES} nodes", len(model.graph.node))


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
        known = [length for length in shape_of(value) if length is not None]
        if _elements(known) > MAX_ELEMENTS:
            refuse(f"at most {MAX_ELEMENTS} elements of {value.name!r}", known)


def _elements(lengths: Iterable[int]) -> int:
    return math.prod(lengths)
