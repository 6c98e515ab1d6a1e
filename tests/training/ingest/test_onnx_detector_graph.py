"""Malicious detector graphs are refused before onnxruntime reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from resight.errors import DetectorError
from resight.training.ingest.onnx_detector import read_head

FLOAT = TensorProto.FLOAT


def make() -> ModelProto:
    """A YOLO v8 head with one class that detects nobody."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["table", "mean"], ["output0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output0", FLOAT, [1, 5, 40])],
        [numpy_helper.from_array(np.ones((1, 5, 40), np.float32), "table")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_plain_graph_passes() -> None:
    head = read_head(make().SerializeToString(), label="it")
    assert (head.kind, head.input, head.size, head.dtype, head.planes) == ("yolo", "images", (64, 64), "float32", True)


def external_data(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def branch(model: ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["mean"], ["x"])], "then", [], [])
    model.graph.node.append(helper.make_node("If", ["mean"], ["y"], then_branch=inner, else_branch=inner))


def function(model: ModelProto) -> None:
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], [], [helper.make_opsetid("", 17)]))


def foreign_operator(model: ModelProto) -> None:
    model.graph.node[0].domain = "com.microsoft"


def huge_constant(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**18, 2**18]), "big"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["big"], ["filled"]))


def runtime_setting(model: ModelProto) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = "ort_config", "{}"


def old_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 9


def two_inputs(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", FLOAT, [1]))


def one_channel(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1


def large_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


def large_image(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 100_000


def integer_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def two_outputs(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("mean", FLOAT, [1]))


def rank_four_output(model: ModelProto) -> None:
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("output0", FLOAT, [1, 5, 40, 1]))


def many_nodes(model: ModelProto) -> None:
    model.graph.node.extend(helper.make_node("Identity", ["mean"], [f"n{number}"]) for number in range(17_000))


@pytest.mark.parametrize(
    "harm, message",
    [
        (external_data, "self-contained"), (branch, "without loops, branches"), (function, "without loops, branches"),
        (foreign_operator, "only ONNX's own operators"), (huge_constant, "elements of 'filled'"),
        (runtime_setting, "settings of onnxruntime"),
        (old_opset, "one opset of 11"), (two_inputs, "one input"), (one_channel, "three colour channels"),
        (large_batch, "an image"),
        (large_image, "an image of 16 to"), (integer_input, "tensor(int64)"), (two_outputs, "an SSD head"),
        (rank_four_output, "a YOLO head"), (many_nodes, "at most"),
    ],
)  # fmt: skip
def test_malicious_graphs_are_refused_before_they_run(harm: Callable[[ModelProto], None], message: str) -> None:
    model = make()
    harm(model)
    with pytest.raises(DetectorError, match=r"^it was refused before running it: ") as error:
        read_head(model.SerializeToString(), label="it")
    assert message in str(error.value)


@pytest.mark.parametrize("data", [b"", b"no graph", onnx.ModelProto().SerializeToString(), bytes(range(256)) * 9])
def test_invalid_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DetectorError, match="refused"):
        read_head(data, label="it")


def test_flipped_bits_never_crash_the_reader() -> None:
    whole, rng = make().SerializeToString(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data) - 800, 3):  # the weights are at the end
            data[place] ^= 1 << rng.integers(8)
        try:
            read_head(bytes(data), label="it")
        except DetectorError:
            pass
