"""A bundle with every form, from the simple graph of `serving`, so that each runtime has a form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from serving import DIM, SPEC, embed_by_hand, weights

from resight.bundle.bundle import Bundle, Graph, write_bundle
from resight.bundle.manifest import space_id
from resight.bundle.probes import EmbedBatch, make_probes, measure_parity

HEAD = [
    helper.make_node("Cast", ["images"], ["f"], to=TensorProto.FLOAT),
    helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
    helper.make_node("Div", ["t", "scale"], ["s"]),
    helper.make_node("Sub", ["s", "half"], ["c"]),
    helper.make_node("AveragePool", ["c"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
    helper.make_node("Flatten", ["p"], ["v"]),
]
TAIL = [
    helper.make_node("ReduceL2", ["m"], ["n"], axes=[1], keepdims=1),
    helper.make_node("Div", ["m", "n"], ["features"]),
]


def product(precision: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """``v`` times the weights as ``m``, in a precision."""
    if precision == "fp32":
        return [helper.make_node("MatMul", ["v", "w"], ["m"])], [numpy_helper.from_array(weights(0), "w")]
    if precision == "fp16":
        nodes = [
            helper.make_node("Cast", ["v"], ["vh"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["vh", "wh"], ["mh"]),
            helper.make_node("Cast", ["mh"], ["m"], to=TensorProto.FLOAT),
        ]
        return nodes, [numpy_helper.from_array(weights(0).astype(np.float16), "wh")]
    scale = np.abs(weights(0)).max(0) / 127.0  # one per column
    quantised = np.round(weights(0) / scale).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["v", "vs", "vz"], ["vq"]),
        helper.make_node("DequantizeLinear", ["vq", "vs", "vz"], ["vd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["vd", "wd"], ["m"]),
    ]
    return nodes, [
        numpy_helper.from_array(np.float32(0.5 / 127), "vs"),
        numpy_helper.from_array(np.int8(0), "vz"),
        numpy_helper.from_array(quantised, "wq"),
        numpy_helper.from_array(scale.astype(np.float32), "ws"),
        numpy_helper.from_array(np.zeros(DIM, np.int8), "wz"),
    ]


def form(precision: str) -> bytes:
    nodes, initial = product(precision)
    constants = [
        numpy_helper.from_array(np.float32(255.0), "scale"),
        numpy_helper.from_array(np.float32(0.5), "half"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SPEC.height, SPEC.width, 3])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", DIM])
    made = helper.make_graph([*HEAD, *nodes, *TAIL], precision, [images], [features], [*constants, *initial])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def run(data: bytes) -> EmbedBatch:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def make_forms(path: Path) -> Bundle:
    """fp32, fp16 and INT8 for onnxruntime, and INT8 for TensorRT."""
    probes = make_probes(SPEC, embed_by_hand, count=8)
    forms = (("fp32", "onnx"), ("fp16", "onnx"), ("int8", "onnx"), ("int8", "tensorrt"))
    graphs = [(form(precision), precision, runtime) for precision, runtime in forms]
    return write_bundle(
        path,
        name="forms",
        space_id=space_id(weights(0).tobytes(), SPEC, DIM),
        image=SPEC,
        graphs=[Graph(data, measure_parity(probes, run(data)), precision, kind) for data, precision, kind in graphs],
        probes=probes,
        weights_licence="none",
        training={},
    )
