"""The check of untrusted ONNX graphs: every graph of a bundle passes it before onnxruntime loads the graph.

Only graphs such as `resight.exporters` writes are accepted: one self-contained graph of a few standard operators in
which every tensor has a known size. Therefore a file cannot refer to other files, contain code, or require memory or
time out of proportion to its weights. The check works on bytes alone and needs ``onnx``, not onnxruntime.

Parsing an untrusted protobuf message is itself costly: 2 bytes can encode an empty node of a hundred bytes, and a 94 MB
model is copied before its first field can be read. Therefore `read_structure` first scans the file in protobuf's wire
format (https://protobuf.dev/programming-guides/encoding/) and skips the weights, only counting their bytes. The
remaining structure, at most half a megabyte in our graphs, is limited in size, parsed, and must be in protobuf's
canonical encoding.

A crop is one row of the batch; "a pixel" below is one of the crop's height times width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from resight.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT
from resight.errors import BundleError
from resight.image import MAX_SIDE, ImageSpec

MAX_GRAPH_BYTES = 512 * 1024 * 1024  # five ResNet-50 in fp32, our largest encoder
MAX_STRUCTURE_BYTES = 2 * 1024 * 1024  # five times that of OSNet x1.0 in INT8 for TensorRT, our largest: 0.42 MB
MAX_GRAPH_FIELDS = 32_768  # of one message; that graph has 5000 nodes, weights and values
SMALL_FIELD_BYTES = 1024  # constants up to this size are parsed: shapes may depend on them (the ends of a slice)
_GRAPH, _INITIALIZER = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_PATH = (_GRAPH, _INITIALIZER, _RAW_DATA)
_FIXED = {1: 8, 5: 4}  # wire types of fixed length
_BYTES = 2  # the wire type of messages, strings and packed numbers


def read_structure(data: bytes) -> tuple[onnx.ModelProto, list[int]]:
    """Parse an ONNX file except its weights.

    Args:
        data: a serialised model.

    Returns:
        The model, without ``raw_data`` larger than `SMALL_FIELD_BYTES` in its initializers; and the number of bytes
        skipped in each initializer.

    Raises:
        BundleError: too large, truncated, or not in protobuf's canonical encoding.
    """
    if not 0 < len(data) <= MAX_GRAPH_BYTES:
        raise BundleError(f"expected 1 to {MAX_GRAPH_BYTES} bytes, found {len(data)}")
    skipped_bytes: list[int] = []
    structure = _copy_without_weights(data, 0, len(data), 0, skipped_bytes)
    model = onnx.ModelProto()
    model.ParseFromString(structure)
    model.DiscardUnknownFields()
    if model.SerializeToString(deterministic=True) != structure:
        raise BundleError(
            "expected protobuf's canonical encoding of an ONNX model, found unknown, repeated or misplaced fields, or "
            "bytes after its end"
        )
    return model, skipped_bytes


def _copy_without_weights(data: bytes, start: int, end: int, depth: int, skipped_bytes: list[int]) -> bytes:
    """Copy the message at ``data[start:end]`` without its weights; ``depth`` is its position on `_PATH`."""
    kept, seen = bytearray(), 0
    for count, (number, begin, value, after) in enumerate(_fields(data, start, end)):
        on_path = number == _PATH[depth]
        seen += on_path
        if on_path and (data[begin] & 7 != _BYTES or (seen > 1 and number != _INITIALIZER)):
            raise BundleError(f"expected one field {number} of bytes in its message, found another at byte {begin}")
        if on_path and number == _RAW_DATA and after - value > SMALL_FIELD_BYTES:
            skipped_bytes[-1] = after - value
            continue
        if on_path and number != _RAW_DATA:
            if number == _INITIALIZER:
                skipped_bytes.append(0)
            inner = _copy_without_weights(data, value, after, depth + 1, skipped_bytes)
            kept += _varint(number << 3 | _BYTES) + _varint(len(inner)) + inner
        else:
            kept += data[begin : min(after, begin + MAX_STRUCTURE_BYTES + 1)]  # one byte too many is detected below
        if len(kept) > MAX_STRUCTURE_BYTES or count >= MAX_GRAPH_FIELDS:
            raise BundleError(
                f"expected at most {MAX_STRUCTURE_BYTES} bytes besides the weights and {MAX_GRAPH_FIELDS} fields of a "
                f"message, found more at byte {begin}"
            )
    return bytes(kept)


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Scan a message: the number of each field, where it begins, where its value begins and where it ends."""
    place = start
    while place < end:
        begin = place
        tag, place = _read_varint(data, place, end)
        number, wire = tag >> 3, tag & 7
        value = place
        if wire == 0:
            _, place = _read_varint(data, place, end)
        elif wire == _BYTES:
            length, value = _read_varint(data, place, end)
            place = value + length
        elif wire in _FIXED:
            place += _FIXED[wire]
        else:
            raise BundleError(f"expected an ONNX model, found invalid protobuf at byte {begin}")
        if place > end:
            raise BundleError(f"expected a complete ONNX model, found it truncated at byte {begin}")
        yield number, begin, value, place


def _read_varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """Read a varint (7 bits per byte, lowest first); returns it and the position after it."""
    number = 0
    for shift in range(0, 70, 7):  # ten bytes hold 64 bits
        if place >= end:
            break
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise BundleError(f"expected a complete ONNX model, found it truncated or invalid at byte {place}")


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


OPERATORS = frozenset(
    # The trunks: OSNet and ResNet as exported by torch.
    "Transpose Cast Sub Conv Relu MaxPool AveragePool ReduceMean Sigmoid Add Mul BatchNormalization"
    # The heads: GeM pooling, stripes, a linear layer, the unit length; MatMul is a linear layer without bias.
    " Clip Pow Slice Concat Flatten Gemm MatMul ReduceL2 Div"
    # INT8; SpaceToDepth turns the first layer's 3 channels into 12, which suits INT8 kernels.
    " QuantizeLinear DequantizeLinear SpaceToDepth GlobalAveragePool".split()
)
OPSETS = range(17, 22)  # ours is 20; onnxruntime runs 21 since 1.20, and before 17 other attributes were in use
IR_VERSIONS = range(8, 11)  # those of opsets 17 to 21 (ONNX, docs/Versioning.md)
MAX_NODES = 8192  # OSNet of 16 stripes in INT8 has 2000
MAX_ELEMENTS_PER_PIXEL = 64  # of one tensor, for one crop; ResNet and OSNet x1.0 need 16 after their first layers
MAX_ALL_ELEMENTS_PER_PIXEL = 8192  # of all tensors, for one crop; OSNet x1.0 in INT8 for TensorRT: 2332
MAX_WORK_PER_PIXEL = 2**20  # multiplications for one crop; ResNet-50: 1.4e5
MAX_CONSTANTS_PER_BYTE = 4  # elements computed from weights alone; Q and DQ make two elements of each four bytes

_BYTES_OF: dict[int, tuple[int, str]] = {  # size of an element, and its field if it is not raw
    TensorProto.FLOAT: (4, "float_data"),
    TensorProto.FLOAT16: (2, "int32_data"),
    TensorProto.UINT8: (1, "int32_data"),
    TensorProto.INT8: (1, "int32_data"),
    TensorProto.INT32: (4, "int32_data"),
    TensorProto.INT64: (8, "int64_data"),
}
_ALLOWED_FIELDS = {
    "ModelProto": "ir_version opset_import producer_name producer_version graph metadata_props",
    "OperatorSetIdProto": "domain version",
    "StringStringEntryProto": "key value",
    "GraphProto": "node name initializer input output value_info",
    "NodeProto": "input output name op_type domain attribute",
    "AttributeProto": "name type i f s ints floats",
    "TensorProto": "dims data_type name raw_data float_data int32_data int64_data",
    "ValueInfoProto": "name type",
    "TypeProto": "tensor_type",
    "Tensor": "elem_type shape",
    "TensorShapeProto": "dim",
    "Dimension": "dim_value dim_param",
}
_ALLOWED = {message: frozenset(fields.split()) for message, fields in _ALLOWED_FIELDS.items()}
_METADATA = {"onnx.infer", "onnx.quant.pre_process"}  # onnxruntime's quantizer; "ort_config" would set its session
_AT_LEAST_ONE = {"kernel_shape", "strides", "dilations", "group", "blocksize"}

Shape = tuple[int | str, ...]
"""Lengths; a dynamic one is represented by its name."""
Value = tuple[int, Shape]
"""Element type and shape of a tensor."""


def check_graph(data: bytes, image: ImageSpec, feature_dim: int | None, *, what: str = "the graph") -> None:
    """Reject a graph that our exporters would not write.

    Args:
        data: a serialised ONNX model.
        image: height and width of the input.
        feature_dim: D, the length of a feature; None: any.
        what: name of the graph in error messages, such as its file.

    Raises:
        BundleError: not uint8 ``images`` (batch, H, W, 3) to float32 ``features`` (batch, D), not self-contained,
            other operators or versions, not topologically sorted, or too large or costly.
    """
    try:
        model, skipped_bytes = read_structure(data)
        _check_fields(model)
        _check_header(model)
        weights = _check_weights(model.graph, skipped_bytes)
        _check_nodes(model.graph, weights)
        batch = _check_input(model.graph, image)
        values = weights | _infer(model, weights, skipped_bytes)
        _check_output(*values[GRAPH_OUTPUT], batch, feature_dim)
        _check_sizes(model.graph, values, batch, image.height * image.width, len(data))
    except Exception as error:  # protobuf and onnx raise many classes without a common base
        problem = str(error) if isinstance(error, BundleError) else f"expected a valid ONNX model, found: {error}"
        shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(problem.split())[:500])
        raise BundleError(
            f"{what} was rejected before it was run: {shown}: export the checkpoint again, "
            "and take bundles only from those you trust"
        ) from error


def _refuse(expected: str, found: object) -> NoReturn:
    raise BundleError(f"expected {expected}, found {str(found)[:200]!r}")


def _check_fields(message: Message) -> None:
    """Reject fields that our graphs do not have: external data, functions, subgraphs, strings, ..."""
    name = message.DESCRIPTOR.name
    for field, value in message.ListFields():
        if field.name not in _ALLOWED[name]:
            _refuse(f"only {', '.join(sorted(_ALLOWED[name]))} in {name} {getattr(message, 'name', '')!r}", field.name)
        if field.message_type is not None:
            for part in value if isinstance(value, Iterable) else [value]:
                _check_fields(part)


def _check_header(model: ModelProto) -> None:
    """Reject unknown versions, domains and settings."""
    if model.ir_version not in IR_VERSIONS:
        _refuse(f"IR version {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}", model.ir_version)
    opsets = [(opset.domain, opset.version) for opset in model.opset_import]
    if len(opsets) != 1 or opsets[0][0] not in ("", "ai.onnx"):
        _refuse("the operators of ONNX alone, without other domains", opsets)
    if opsets[0][1] not in OPSETS:
        _refuse(f"opset {OPSETS[0]} to {OPSETS[-1]}", opsets[0][1])
    unknown = {entry.key for entry in model.metadata_props} - _METADATA
    if unknown:
        _refuse(f"no metadata but {', '.join(sorted(_METADATA))}", sorted(unknown))


def _check_weights(graph: GraphProto, skipped_bytes: list[int]) -> dict[str, Value]:
    """Types and shapes of the initializers, which must agree with their number of bytes."""
    found: dict[str, Value] = {}
    for tensor, skipped in zip(graph.initializer, skipped_bytes, strict=True):
        size, field = _BYTES_OF.get(tensor.data_type, (0, ""))
        if not size:
            _refuse(f"weights of type {', '.join(map(_type_name, _BYTES_OF))}", _type_name(tensor.data_type))
        count = math.prod(tensor.dims)
        fields = ("float_data", "int32_data", "int64_data")
        holders: dict[str, float] = {name: len(getattr(tensor, name)) for name in fields}
        holders["raw_data"] = (len(tensor.raw_data) + skipped) / size
        held = {name: length for name, length in holders.items() if length}
        if min(tensor.dims, default=1) < 1 or held not in ({"raw_data": count}, {field: count}):
            _refuse(f"{count} elements of weights {tensor.name!r} {list(tensor.dims)}", held)
        if not tensor.name or tensor.name in found:
            _refuse("a unique name for each initializer", tensor.name)
        found[tensor.name] = tensor.data_type, tuple(tensor.dims)
    return found


def _check_nodes(graph: GraphProto, weights: Mapping[str, Value]) -> None:
    """Reject other operators, invalid attributes, and graphs that are not topologically sorted."""
    names = [value.name for value in (*graph.input, *graph.output)]
    if names != [GRAPH_INPUT, GRAPH_OUTPUT]:
        _refuse(f"one input {GRAPH_INPUT} and one output {GRAPH_OUTPUT}", names)
    if len(graph.node) > MAX_NODES:
        _refuse(f"at most {MAX_NODES} nodes", len(graph.node))
    known = {GRAPH_INPUT, *weights}
    if len(known) == len(weights):
        _refuse("no weights that take the input's name", GRAPH_INPUT)
    for node in graph.node:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            _refuse("operators that our exporters write", f"{node.domain}:{node.op_type}")
        missing = [name for name in node.input if name and name not in known]
        if missing:
            _refuse(f"each input of {node.op_type} {node.name!r} made before it (a cycle is not)", missing)
        made = [name for name in node.output if name]
        if len(set(made)) != len(made) or not known.isdisjoint(made) or not made:
            _refuse("each value made once", list(node.output))
        known.update(made)
        if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
            _refuse("each attribute once", f"{node.op_type} {node.name}")
        for attribute in node.attribute:
            _check_attribute(node, attribute)


def _check_attribute(node: NodeProto, attribute: AttributeProto) -> None:
    """Reject attribute values out of the range that crops need; onnxruntime would compute with them."""
    name = f"{attribute.name} of {node.op_type} {node.name!r}"
    least = 1 if attribute.name in _AT_LEAST_ONE else 0 if attribute.name == "pads" else -MAX_SIDE
    numbers = (*attribute.ints, *([attribute.i] if attribute.HasField("i") else []))
    odd = [number for number in numbers if not least <= number <= MAX_SIDE]
    if odd:
        _refuse(f"{name} within {least}..{MAX_SIDE}", odd[:4])
    if attribute.s not in (b"", b"NOTSET") or not all(map(math.isfinite, (*attribute.floats, attribute.f))):
        _refuse(f"a finite {name}, and no padding by name", attribute.s or "infinity or NaN")


def _infer(model: ModelProto, weights: Mapping[str, Value], skipped_bytes: list[int]) -> dict[str, Value]:
    """Infer type and shape of every value from the nodes alone; types and shapes stated in the file must agree."""
    graph = model.graph
    claimed = {value.name: _value(value) for value in (*graph.value_info, *graph.output)}
    small = [tensor for tensor, skipped in zip(graph.initializer, skipped_bytes, strict=True) if not skipped]
    large = weights.keys() - {tensor.name for tensor in small}
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    del skeleton.graph.value_info[:], skeleton.graph.initializer[:]
    skeleton.graph.initializer.extend(small)
    skeleton.graph.input.extend(onnx.helper.make_tensor_value_info(name, *weights[name]) for name in sorted(large))
    onnx.checker.check_model(skeleton)  # each node against its operator's definition
    for output in skeleton.graph.output:
        output.type.tensor_type.ClearField("shape")  # else stated shapes would be used
    inferred = onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True).graph
    values = {value.name: _value(value) for value in (*inferred.value_info, *inferred.output, graph.input[0])}
    for name, claim in claimed.items():
        if values.get(name, claim) != claim:
            _refuse(f"{name!r} as its nodes make it, {values[name]}", claim)
    return values


def _value(value: ValueInfoProto) -> Value:
    """Type and shape of a tensor; rejects unknown ranks or lengths."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    if not tensor.HasField("shape") or "" in shape or tensor.elem_type not in _BYTES_OF:
        _refuse(f"a known type and size of value {value.name!r}", (_type_name(tensor.elem_type), shape))
    return tensor.elem_type, shape


def _type_name(number: int) -> str:
    return str(TensorProto.DataType.Name(number)) if number in TensorProto.DataType.values() else f"number {number}"


def _check_input(graph: GraphProto, image: ImageSpec) -> str:
    """Check the input's type and shape; returns the name of the batch dimension."""
    kind, shape = _value(graph.input[0])
    batch = shape[0] if shape else 0
    if kind != TensorProto.UINT8 or shape != (batch, image.height, image.width, 3) or not isinstance(batch, str):
        _refuse(
            f"{GRAPH_INPUT} as UINT8 (batch, {image.height}, {image.width}, 3), the batch free",
            f"{_type_name(kind)} {shape}",
        )
    return batch


def _check_output(kind: int, shape: Shape, batch: str, feature_dim: int | None) -> None:
    """Check the output's type and shape."""
    known = len(shape) == 2 and isinstance(shape[1], int) and feature_dim in (None, shape[1])
    if kind != TensorProto.FLOAT or not known or shape[0] != batch:
        size = "D" if feature_dim is None else feature_dim
        _refuse(f"{GRAPH_OUTPUT} as FLOAT ({batch}, {size})", f"{_type_name(kind)} {shape}")


def _check_sizes(graph: GraphProto, values: Mapping[str, Value], batch: str, pixels: int, size: int) -> None:
    """Limit the memory and time a graph needs, relative to the crop's pixels and the file's ``size`` in bytes."""
    elements = work = constants = 0
    for node in graph.node:
        for name in filter(None, node.output):
            _, shape = values[name]
            rest = shape[1:] if shape[:1] == (batch,) else shape
            lengths = [length for length in rest if isinstance(length, int) and length >= 1]
            if len(lengths) != len(rest):
                _refuse(f"value {name!r} of known size but for the batch, which is first", shape)
            count = math.prod(lengths)
            if rest is shape:
                constants += count
            elif count > MAX_ELEMENTS_PER_PIXEL * pixels:
                _refuse(f"at most {MAX_ELEMENTS_PER_PIXEL * pixels} elements of {name!r} for one crop", count)
            else:
                elements += count
            work += count * _multiplications(node, values)
    for what, found, most in (
        ("elements of all values for one crop", elements, MAX_ALL_ELEMENTS_PER_PIXEL * pixels),
        ("multiplications for one crop", work, MAX_WORK_PER_PIXEL * pixels),
        ("elements computed of weights alone", constants, MAX_CONSTANTS_PER_BYTE * size),
    ):
        if found > most:
            _refuse(f"at most {most} {what}", found)


def _multiplications(node: NodeProto, values: Mapping[str, Value]) -> int:
    """Multiplications (for pooling: comparisons or additions) per element of a node's output."""

    def lengths(place: int) -> list[int]:
        return [length for length in values[node.input[place]][1] if isinstance(length, int)]

    if node.op_type == "Conv":
        return math.prod(lengths(1)[1:])  # weights (out, in, height, width)
    if node.op_type in ("Gemm", "MatMul"):
        return max(lengths(0), default=1)
    if node.op_type in ("ReduceMean", "ReduceL2", "GlobalAveragePool"):
        return math.prod(lengths(0))
    return math.prod(number for entry in node.attribute if entry.name == "kernel_shape" for number in entry.ints)
