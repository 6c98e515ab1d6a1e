"""The graph check: exported graphs pass, everything else is rejected before onnxruntime loads it."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from serving import DIM, SPEC, graph
from serving import weights as weights_of

from resight.bundle.graph_check import MAX_GRAPH_BYTES, MAX_NODES, MAX_STRUCTURE_BYTES, OPERATORS, check_graph
from resight.encoder.model import Encoder, EncoderConfig
from resight.errors import BundleError
from resight.exporters.fp16 import to_fp16
from resight.exporters.int8 import calibrate, quantize_graph
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.image import ImageSpec

pytestmark = pytest.mark.long

PIXELS = SPEC.height * SPEC.width
CONFIGS = {
    "stripes": EncoderConfig("resnet18", "gem", 0, ImageSpec(80, 32), parts=3, part_dim=16, local_share=0.5),
    "osnet-avg": EncoderConfig("osnet_x0_25", "avg", 64, ImageSpec(64, 32)),
}  # fmt: skip


def refused(data: bytes, message: str, *, feature_dim: int | None = DIM) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        check_graph(data, SPEC, feature_dim, what="model.onnx")
    assert str(caught.value).startswith("model.onnx was rejected before it was run: expected ")
    assert str(caught.value).endswith("take bundles only from those you trust")


def model() -> ModelProto:
    return onnx.load_from_string(graph(0))


def node(of: ModelProto, operator: str) -> NodeProto:
    return next(entry for entry in of.graph.node if entry.op_type == operator)


def insert(of: ModelProto, operator: str, *inputs: str, after: str = "Transpose", copies: int = 1, **more: Any) -> None:
    """Insert nodes behind the first node of an operator, each reading the previous output (``*``)."""
    nodes = list(of.graph.node)
    place = next(i for i, entry in enumerate(nodes) if entry.op_type == after)
    name, made = nodes[place].output[0], []
    for number in range(len(nodes), len(nodes) + copies):
        taken = [name if given == "*" else given for given in inputs or ("*",)]
        name = f"new{number}"
        made.append(helper.make_node(operator, taken, [name], **more))
    del of.graph.node[:]
    of.graph.node.extend([*nodes[: place + 1], *made, *nodes[place + 1 :]])


def weights(of: ModelProto, name: str, values: NDArray[Any]) -> None:
    of.graph.initializer.append(numpy_helper.from_array(values, name))


def test_a_small_graph_passes_and_its_feature_length_is_checked() -> None:
    check_graph(graph(0), SPEC, DIM)
    check_graph(graph(0), SPEC, None)
    refused(graph(0), rf"features as FLOAT \(N, {DIM + 1}\), found .*FLOAT .*{DIM}\)", feature_dim=DIM + 1)


@cache
def quantized(name: str, *, symmetric: bool = False) -> bytes:
    image = CONFIGS[name].image
    crops = np.random.default_rng(0).integers(0, 256, (16, image.height, image.width, 3), dtype=np.uint8)
    return quantize_graph(calibrate(exported(name), crops), symmetric=symmetric)


@cache
def exported(name: str) -> bytes:
    torch.manual_seed(0)
    return to_onnx(ServingGraph(Encoder(CONFIGS[name]).eval()), CONFIGS[name].image)


@pytest.fixture(scope="module", params=["stripes", pytest.param("osnet-avg", marks=pytest.mark.slow)])
def forms(request: pytest.FixtureRequest) -> dict[str, bytes]:
    """One encoder in fp32, fp16 and both kinds of INT8."""
    name = request.param
    image = CONFIGS[name].image
    return {
        "fp32": exported(name),
        "fp16": to_fp16(exported(name)),
        "int8": quantized(name),
        "int8 for TensorRT": quantized(name, symmetric=True),
        "image": repr((image.height, image.width)).encode(),
    }


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "int8 for TensorRT"])
def test_what_our_exporters_write_passes(forms: dict[str, bytes], form: str) -> None:
    height, width = map(int, forms["image"].strip(b"()").split(b","))
    check_graph(forms[form], ImageSpec(height, width), None)
    with pytest.raises(BundleError, match="images as UINT8"):
        check_graph(forms[form], ImageSpec(height + 16, width), None)


@pytest.mark.slow
def test_only_operators_that_our_graphs_need_are_allowed() -> None:
    found = {entry.op_type for entry in model().graph.node}
    for name in CONFIGS:
        for data in (exported(name), quantized(name)):
            found |= {entry.op_type for entry in onnx.load_from_string(data).graph.node}
    assert found == OPERATORS


def external(of: ModelProto) -> None:
    tensor = of.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_attribute(of: ModelProto) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1], name="x", data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    of.graph.node.insert(0, helper.make_node("Constant", [], ["x"], value=tensor))


def sparse(of: ModelProto, *, attribute: bool = False) -> None:
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "s"), numpy_helper.from_array(np.zeros(1, int))
    tensor = helper.make_sparse_tensor(values, indices, [3])
    if attribute:
        of.graph.node.insert(0, helper.make_node("Constant", [], ["x"], sparse_value=tensor))
    else:
        of.graph.sparse_initializer.append(tensor)


def branch(of: ModelProto, operator: str) -> None:
    body = helper.make_graph([], "body", [], [])
    names = ("then_branch", "else_branch") if operator == "If" else ("body",)
    attributes = [AttributeProto(name=name, type=AttributeProto.GRAPH, g=body) for name in names]
    of.graph.node.insert(0, helper.make_node(operator, ["scale"], ["x"]))
    of.graph.node[0].attribute.extend(attributes)


def function(of: ModelProto) -> None:
    inner = helper.make_node("Relu", ["a"], ["b"])
    of.functions.append(helper.make_function("local", "f", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)]))


def strings(of: ModelProto) -> None:
    of.graph.initializer.append(TensorProto(data_type=TensorProto.STRING, name="text", dims=[1], string_data=[b"x"]))


def typed(kind: str) -> Callable[[ModelProto], None]:
    def change(of: ModelProto) -> None:
        inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
        made = helper.make_sequence_type_proto(inner) if kind == "sequence" else helper.make_optional_type_proto(inner)
        of.graph.value_info.append(helper.make_value_info("c", made))

    return change


def domain(of: ModelProto) -> None:
    node(of, "Sub").domain = "com.microsoft"


def version(opset: int = 17, ir: int = 9) -> Callable[[ModelProto], None]:
    def change(of: ModelProto) -> None:
        of.opset_import[0].version, of.ir_version = opset, ir

    return change


def operator(name: str, *inputs: str, **attributes: Any) -> Callable[[ModelProto], None]:
    return lambda of: insert(of, name, *inputs, **attributes)


def add_attribute(operator_name: str, **attributes: Any) -> Callable[[ModelProto], None]:
    made = [helper.make_attribute(name, value) for name, value in attributes.items()]
    return lambda of: node(of, operator_name).attribute.extend(made)


FOREIGN: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "external data": (external, "in TensorProto 'scale', found 'external_data'"),
    "external data of an attribute": (external_attribute, "in AttributeProto 'value', found 't'"),
    "sparse weights": (sparse, "found 'sparse_initializer'"),
    "sparse attribute": (lambda of: sparse(of, attribute=True), "found 'sparse_tensor'"),
    "domain imported": (lambda of: of.opset_import.append(helper.make_opsetid("evil", 1)), "without other domains"),
    "domain of a node": (domain, "operators that our exporters write, found 'com.microsoft:Sub'"),
    "function": (function, "found 'functions'"),
    "training": (lambda of: of.training_info.add().SetInParent(), "found 'training_info'"),
    "If": (lambda of: branch(of, "If"), "in AttributeProto 'then_branch', found 'g'"),
    "Loop": (lambda of: branch(of, "Loop"), "in AttributeProto 'body', found 'g'"),
    "Scan": (lambda of: branch(of, "Scan"), "in AttributeProto 'body', found 'g'"),
    "strings": (strings, "found 'string_data'"),
    "strings in an attribute": (add_attribute("Sub", texts=["a", "b"]), "found 'strings'"),
    "sequence": (typed("sequence"), "in TypeProto '', found 'sequence_type'"),
    "optional": (typed("optional"), "in TypeProto '', found 'optional_type'"),
    "settings of the session": (lambda of: helper.set_model_props(of, {"ort_config": "{}"}), "found .*ort_config"),
    "opset before": (version(opset=16), "opset 17 to 21, found '16'"),
    "opset after": (version(opset=22), "opset 17 to 21, found '22'"),
    "IR before": (version(ir=7), "IR version 8 to 10, found '7'"),
    "IR after": (version(ir=11), "IR version 8 to 10, found '11'"),
    **{
        name: (operator(name, *inputs), f"operators that our exporters write, found ':{name}'")
        for name, *inputs in (
            ("Sin",),
            ("Identity",),
            ("ConstantOfShape", "shape"),
            ("Expand", "*", "shape"),
            ("Resize", "*", "", "scales"),
            ("Pad", "*", "pads"),
            ("Tile", "*", "repeats"),
            ("Reshape", "*", "shape"),
            ("NonZero",),
            ("RandomNormalLike",),
        )
    },
}


@pytest.mark.parametrize("harm", FOREIGN)
def test_fields_that_our_graphs_do_not_have_are_rejected(harm: str) -> None:
    change, message = FOREIGN[harm]
    found = model()
    change(found)
    refused(found.SerializeToString(), message)


def cycle(of: ModelProto) -> None:
    node(of, "Sub").input[0] = "m"


def unsorted(of: ModelProto) -> None:
    nodes = list(of.graph.node)
    del of.graph.node[:]
    of.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])


def unlike(of: ModelProto, place: str, kind: int, shape: list[int | str | None], name: str) -> None:
    value = (of.graph.input if place == "input" else of.graph.output)[0]
    value.CopyFrom(helper.make_tensor_value_info(name, kind, shape))


def tensor(**changes: Any) -> Callable[[ModelProto], None]:
    def change(of: ModelProto) -> None:
        found = of.graph.initializer[2]
        assert found.name == "w"
        for name, value in changes.items():
            found.ClearField(name)
            getattr(found, name).extend(value) if isinstance(value, list) else setattr(found, name, value)

    return change


UINT8, FLOAT = TensorProto.UINT8, TensorProto.FLOAT
IMAGES = ["N", SPEC.height, SPEC.width, 3]
ODD: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "cycle": (cycle, r"each input of Sub '' made before it .*'m'"),
    "not sorted": (unsorted, r"each input of Div '' made before it .*'f'"),
    "dangling": (lambda of: node(of, "MatMul").input.append("nowhere"), "made before it .*nowhere"),
    "made twice": (lambda of: node(of, "Sub").output.append("s"), "each value made once"),
    "made over weights": (lambda of: node(of, "Sub").output.append("w"), "each value made once"),
    "made over the input": (lambda of: node(of, "Sub").output.append("images"), "each value made once"),
    "weights over the input": (lambda of: weights(of, "images", np.zeros(1, np.uint8)), "take the input's name"),
    "weights twice": (lambda of: weights(of, "w", np.zeros(1, np.uint8)), "a unique name for each initializer"),
    "float images": (lambda of: unlike(of, "input", FLOAT, IMAGES, "images"), r"images as UINT8 .*found .FLOAT"),
    "a fixed batch": (
        lambda of: unlike(of, "input", UINT8, [2, *IMAGES[1:]], "images"),
        r"the batch free, found .UINT8 \(2, 64",
    ),
    "a batch without a name": (
        lambda of: unlike(of, "input", UINT8, [None, *IMAGES[1:]], "images"),
        "a known type and size of value 'images'",
    ),
    "a free height": (lambda of: unlike(of, "input", UINT8, ["N", "H", 32, 3], "images"), r"found .*'H'"),
    "another name": (lambda of: unlike(of, "output", FLOAT, ["N", DIM], "out"), "one output features, found"),
    "another length": (
        lambda of: unlike(of, "output", FLOAT, ["N", DIM + 1], "features"),
        "'features' as its nodes make it",
    ),
    "another input": (
        lambda of: of.graph.input.append(onnx.ValueInfoProto(name="more")),
        "one input images .*found .*more",
    ),
    "no output": (lambda of: of.graph.ClearField("output"), "one output features"),
    "another output": (
        lambda of: of.graph.output.append(helper.make_tensor_value_info("m", FLOAT, ["N", DIM])),
        "one output features, found .*'m'",
    ),
    "a value that lies": (
        lambda of: of.graph.value_info.append(helper.make_tensor_value_info("m", FLOAT, ["N", 1])),
        "'m' as its nodes make it",
    ),
    "weights too short": (tensor(dims=[96, DIM + 1]), r"3168 elements of weights 'w' \[96, 33\]"),
    "weights too long": (tensor(dims=[96, DIM - 1]), r"2976 elements of weights 'w'"),
    "terabytes of weights": (tensor(dims=[2**40, 2**20]), "elements of weights 'w'"),
    "lengths that overflow": (tensor(dims=[2**62, 2**62, 2**62]), "elements of weights 'w'"),
    "negative lengths": (tensor(dims=[-96, -DIM]), "elements of weights 'w'"),
    "no elements": (tensor(dims=[0, DIM], raw_data=b""), "elements of weights 'w'"),
    "weights that are not there": (tensor(raw_data=b""), "elements of weights 'w'"),
    "weights in two places": (tensor(float_data=[1.0]), "elements of weights 'w'"),
    "weights in another's place": (tensor(raw_data=b"", int32_data=[0] * 96 * DIM), "elements of weights 'w'"),
    "doubles": (tensor(data_type=TensorProto.DOUBLE), "weights of type .*found 'DOUBLE'"),
    "a type that is none": (tensor(data_type=99), "weights of type .*found 'number 99'"),
    "attribute twice": (add_attribute("Transpose", perm=[0, 3, 1, 2]), "each attribute once"),
    "attribute unknown": (add_attribute("Relu", surprise=1), "surprise"),
    "attribute not finite": (add_attribute("Sub", alpha=float("nan")), "a finite alpha"),
    "padding by name": (add_attribute("AveragePool", auto_pad="SAME_UPPER"), "no padding by name"),
    "a stride of 0": (
        operator("MaxPool", kernel_shape=[1, 1], strides=[0, 1]),
        r"strides of MaxPool '' within 1\.\.4096",
    ),
    "a dilation of 0": (operator("MaxPool", kernel_shape=[2, 2], dilations=[0, 0]), "dilations of MaxPool"),
    "no rank": (operator("ReduceMean", axes=[7]), "valid ONNX model, found"),
}  # fmt: skip


@pytest.mark.parametrize("harm", ODD)
def test_invalid_graphs_are_rejected(harm: str) -> None:
    change, message = ODD[harm]
    found = model()
    insert(found, "Relu")  # an attribute to modify
    change(found)
    refused(found.SerializeToString(), message, feature_dim=None)


def doubling(of: ModelProto) -> None:
    insert(of, "Concat", "*", "*", copies=30, axis=1)


def wide_weights(of: ModelProto) -> None:
    """32 KB of weights that are expanded to 64 million elements."""
    weights(of, "row", np.ones((1, 8000), np.float32))
    of.graph.node.insert(0, helper.make_node("Transpose", ["row"], ["column"], perm=[1, 0]))
    of.graph.node.insert(1, helper.make_node("Mul", ["row", "column"], ["square"]))


def many_values(of: ModelProto) -> None:
    insert(of, "Concat", *["*"] * 20, axis=1)  # 60 elements per pixel, 200 times
    insert(of, "Relu", after="Concat", copies=200)


def much_work(of: ModelProto) -> None:
    """Few bytes, no large tensor, but as many comparisons as eight ResNet-50."""
    insert(of, "MaxPool", kernel_shape=[63, 31], pads=[31, 15, 31, 15], copies=400)


def free_length(of: ModelProto) -> None:
    """A slice whose end is computed, so its length is unknown."""
    of.graph.node.insert(1, helper.make_node("ReduceL2", ["f"], ["all"], keepdims=0))
    of.graph.node.insert(2, helper.make_node("Cast", ["all"], ["ends"], to=TensorProto.INT64))
    weights(of, "zero", np.zeros(1, np.int64))
    insert(of, "Slice", "*", "zero", "ends")


LARGE: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "nodes": (lambda of: insert(of, "Relu", copies=MAX_NODES), f"at most {MAX_NODES} nodes"),
    "doubled 30 times": (doubling, rf"at most {64 * PIXELS} elements of 'new\d+' for one crop, found '"),
    "padded": (
        operator("AveragePool", kernel_shape=[2, 2], pads=[4000] * 4),
        f"at most {64 * PIXELS} elements of 'new9' for one crop",
    ),
    "padded beyond numbers": (
        operator("AveragePool", kernel_shape=[1, 1], pads=[2**62] * 4),
        r"pads of .* within 0\.\.4096",
    ),
    "many values": (many_values, f"at most {8192 * PIXELS} elements of all values"),
    "much work": (much_work, f"at most {2**20 * PIXELS} multiplications"),
    "made of small weights": (wide_weights, "elements computed of weights alone"),
    "unknown length": (free_length, r"value 'new\d+' of known size|a known type and size of value 'new\d+'"),
    "batch elsewhere": (operator("Transpose", perm=[1, 0, 2, 3]), "the batch, which is first"),
    "batch twice": (operator("Concat", "*", "*", axis=0), "value 'new9' of known size but for the batch"),
}  # fmt: skip


@pytest.mark.parametrize("harm", LARGE)
def test_a_graph_that_is_too_costly_is_rejected(harm: str) -> None:
    change, message = LARGE[harm]
    found = model()
    change(found)
    data = found.SerializeToString()
    assert len(data) < 500_000
    refused(data, message)


def field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    length, size = b"", len(content)
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "1 to .* bytes, found 0"),
        (b"\x80\x04\x95" + bytes(40), "expected"),
        (b"<html>not found</html>", "expected"),
        (graph(0) + b"junk", "expected"),
        (graph(0) + field(15, b"x"), "unknown, repeated or misplaced fields"),
        (graph(0) + field(7, b""), "one field 7"),
        (graph(0) + graph(0), "one field 7"),
        (field(7, field(1, b"") * (MAX_STRUCTURE_BYTES // 2)), "fields of a message"),
        (field(7, field(1, bytes(MAX_STRUCTURE_BYTES))), "bytes besides the weights"),
        (field(7, field(5, field(9, bytes(2000)) * 2)), "one field 9"),
        (field(7, b"\x28\x01"), "one field 5"),
        (bytes([7 << 3 | 2]) + b"\xff" * 10, "truncated or invalid"),
        (b"\x0b" * 9, "invalid protobuf"),
        (b"\x0a\xff\xff\xff\xff\x07", "truncated"),
        (bytes(MAX_GRAPH_BYTES + 1), f"1 to {MAX_GRAPH_BYTES} bytes"),
    ],
    ids=[
        "empty", "pickle", "web page", "junk behind", "field behind", "empty graph behind", "twice", "empty nodes",
        "long node", "raw data twice", "weights that are a number", "endless number", "groups", "length beyond", "huge",
    ],
)  # fmt: skip
def test_bytes_that_are_not_a_graph_are_rejected(data: bytes, message: str) -> None:
    refused(data, message)


def test_a_truncated_graph_is_rejected() -> None:
    whole = graph(0)
    for end in [*range(0, len(whole), 97), *range(len(whole) - 40, len(whole))]:
        refused(whole[:end], "expected")


def test_any_altered_bit_outside_the_weights_is_rejected_or_harmless() -> None:
    whole = graph(0)
    begin = whole.index(weights_of(0).tobytes())
    structure = [*range(begin), *range(begin + weights_of(0).nbytes, len(whole))]
    renamed = 0
    for place in structure:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        try:
            check_graph(bytes(damaged), SPEC, DIM)
        except BundleError as error:
            assert "rejected before it was run" in str(error)
            continue
        found = onnx.load_from_string(bytes(damaged))
        assert {entry.op_type for entry in found.graph.node} <= OPERATORS
        renamed += 1
    assert renamed < len(structure) / 10  # the graph's own name, two constants, a divisor in another order


def test_weights_are_counted_not_copied() -> None:
    found = model()
    insert(found, "MatMul", "*", "wide", after="Flatten")
    weights(found, "wide", np.zeros((96, 60_000), np.float32))
    data = found.SerializeToString()
    tracemalloc.start()
    try:
        check_graph(data, SPEC, DIM)
        assert tracemalloc.get_traced_memory()[1] < len(data) / 20
    finally:
        tracemalloc.stop()


def test_the_check_does_not_need_onnxruntime(tmp_path: Path) -> None:
    hostile = model()
    external(hostile)
    (tmp_path / "good.onnx").write_bytes(graph(0))
    (tmp_path / "hostile.onnx").write_bytes(hostile.SerializeToString())
    code = f"""
import pathlib, sys
sys.modules["onnxruntime"] = sys.modules["torch"] = None  # importing either now raises
from resight.errors import BundleError
from resight.bundle.graph_check import check_graph
from resight.image import ImageSpec
for name in ("good", "hostile"):
    try:
        check_graph(pathlib.Path(name + ".onnx").read_bytes(), ImageSpec({SPEC.height}, {SPEC.width}), {DIM})
        print(name, "passes")
    except BundleError as error:
        print(name, "external_data" in str(error))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60
    )
    assert answer.stdout.split("\n")[:2] == ["good passes", "hostile True"]
