"""Conversion of a serving graph to half precision for GPUs: the trunk in fp16, the nodes before and after it in fp32.

fp16 has 11 bits of precision and a maximum of 65504. The trunk's batch-normalised maps stay far below it. The other
nodes need fp32's range or precision; they are small, so keeping them costs no time: see `_outside_trunk`.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel


def to_fp16(model: bytes) -> bytes:
    """Convert a serving graph to fp16; deterministic.

    Args:
        model: fp32 ONNX model written by `resight.exporters.onnx_graph`.

    Returns:
        A model of the same signature: uint8 ``images`` in, float32 ``features`` of unit length out.
    """
    plain = onnx.load_model_from_string(model)
    outputs = [value.name for value in plain.graph.output]
    half = OnnxModel(
        convert_float_to_float16(plain, keep_io_types=outputs, op_block_list=[], node_block_list=_outside_trunk(plain))
    )
    _join_casts(half.model.graph)
    half.topological_sort()  # the converter appends its casts at the end
    half.model.graph.ClearField("value_info")
    onnx.checker.check_model(half.model, full_check=True)
    data: bytes = half.model.SerializeToString(deterministic=True)
    return data


def _outside_trunk(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that stay in fp32.

    - Before the first convolution: bytes and their mean. fp16 cannot hold a mean such as 123.675 exactly, and every
      pixel would be off by the difference.
    - After the last residual sum. GeM takes a power of about 3, and 65504 is the cube of 40; the mean of its map sums
      hundreds of those. The neck's batch norm divides by small variances. The unit length sums D squares, and its
      floor of 1e-12 is zero in fp16. Features are compared in fp32, so they are made in fp32.
    """
    nodes = list(model.graph.node)
    convolutions = [index for index, node in enumerate(nodes) if node.op_type == "Conv"]
    last = convolutions[-1] + 1
    while nodes[last].op_type in ("Add", "Relu"):
        last += 1
    return [node.name for node in (*nodes[: convolutions[0]], *nodes[last:])]


def _join_casts(graph: onnx.GraphProto) -> None:
    """Remove casts to fp16 and back: the converter rounds between any two nodes, even if both are in fp32."""
    rounding = {node.output[0]: node.input[0] for node in graph.node if _casts_to(node, TensorProto.FLOAT16)}
    exact = {  # rounded tensor -> the fp32 tensor it is a copy of
        node.output[0]: rounding[node.input[0]]
        for node in graph.node
        if _casts_to(node, TensorProto.FLOAT) and node.input[0] in rounding
    }
    outputs = {exact[value.name]: value.name for value in graph.output if value.name in exact}
    unique = {tuple(node.output): node for node in graph.node}  # it repeats a cast per reader
    nodes = [node for node in unique.values() if not exact.keys() & set(node.output)]
    for node in nodes:
        node.input[:] = [outputs.get(exact.get(name, name), exact.get(name, name)) for name in node.input]
        node.output[:] = [outputs.get(name, name) for name in node.output]
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if read.intersection(node.output))


def _casts_to(node: NodeProto, to: int) -> bool:
    return node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == to
