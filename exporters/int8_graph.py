"""The same function in the operators that onnxruntime's CPU has fast INT8 kernels for.

All rewrites are exact up to rounding and leave the fp32 graph as it was; they made INT8 OSNet x1.0 a quarter faster
and OSNet x0.25 a third (`benchmarks/bench_runtime.py`). TensorRT has its own fusions and takes the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper


def suit_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a serving graph for onnxruntime's INT8 kernels on CPUs.

    Args:
        model: what `resight.exporters.to_onnx` writes, every node named; left as it is.

    Returns:
        A model of the same input and output; node names are kept.
    """
    suited = onnx.ModelProto()
    suited.CopyFrom(model)
    graph = suited.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    channels: dict[str, int] = {}  # of a tensor, as far as the last convolution says
    nodes: list[NodeProto] = []
    stem = next((node.name for node in graph.node if node.op_type == "Conv"), "")
    for node in graph.node:
        if node.op_type == "Conv":
            channels[node.output[0]] = weights[node.input[1]].dims[0]
        elif node.input and node.input[0] in channels:
            channels[node.output[0]] = channels[node.input[0]]
        if node.name == stem and _is_stem(node, graph):
            made = _fold_stem(node, weights)
        elif node.op_type == "AveragePool" and _is_halving(node) and node.input[0] in channels:
            made = _convolve_average(node, channels[node.input[0]])
        elif node.op_type == "ReduceMean" and _is_spatial(node, weights):
            made = iter([helper.make_node("GlobalAveragePool", node.input[:1], node.output, name=node.name)])
        else:
            made = iter([node])
        for part in made:
            if isinstance(part, onnx.TensorProto):
                graph.initializer.append(part)
            else:
                nodes.append(part)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return suited


def _attributes(node: NodeProto) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _is_stem(node: NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether a convolution is 7x7 with stride 2 and padding 3 over an image of even sides."""
    found = _attributes(node)
    sides = [side.dim_value for side in graph.input[0].type.tensor_type.shape.dim[1:3]]
    wanted = {"kernel_shape": [7, 7], "strides": [2, 2], "pads": [3, 3, 3, 3], "group": 1, "dilations": [1, 1]}
    return all(found.get(name) == value for name, value in wanted.items()) and all(side % 2 == 0 for side in sides)


def _fold_stem(node: NodeProto, weights: dict[str, onnx.TensorProto]) -> Iterator[NodeProto | onnx.TensorProto]:
    """7x7 with stride 2 over 3 channels -> 4x4 over the 12 channels of 2x2 blocks.

    onnxruntime gathers INT8 patches channel run by channel run, and runs of 3 bytes are nearly all overhead.
    Output o reads rows 2o-3..2o+3; with a row of zero weights before them these are the blocks o-2..o+1.
    """
    kernel = numpy_helper.to_array(weights[node.input[1]])
    outputs, inputs = kernel.shape[:2]
    wide: NDArray[np.float32] = np.zeros((outputs, inputs, 8, 8), np.float32)
    wide[:, :, 1:, 1:] = kernel
    blocks = wide.reshape(outputs, inputs, 4, 2, 4, 2).transpose(0, 3, 5, 1, 2, 4)  # (O, dy, dx, C, 4, 4)
    folded = np.ascontiguousarray(blocks.reshape(outputs, 4 * inputs, 4, 4))
    name = f"{node.input[1]}_folded"
    yield numpy_helper.from_array(folded, name)
    yield helper.make_node("SpaceToDepth", node.input[:1], [f"{name}_blocks"], name=f"{node.name}_blocks", blocksize=2)
    yield helper.make_node(
        "Conv",
        [f"{name}_blocks", name, *node.input[2:]],
        node.output,
        name=node.name,
        kernel_shape=[4, 4],
        pads=[2, 2, 1, 1],
        strides=[1, 1],
        dilations=[1, 1],
        group=1,
    )


def _is_halving(node: NodeProto) -> bool:
    """Whether an average pool is 2x2 with stride 2, without padding."""
    found = _attributes(node)
    pads = found.get("pads", [0, 0, 0, 0])
    return (found["kernel_shape"], found.get("strides"), pads) == ([2, 2], [2, 2], [0, 0, 0, 0]) and not (
        found.get("ceil_mode") or found.get("auto_pad", b"NOTSET") != b"NOTSET"
    )


def _convolve_average(node: NodeProto, channels: int) -> Iterator[NodeProto | onnx.TensorProto]:
    """2x2 averages -> a convolution of each channel by itself; onnxruntime's INT8 pooling is slower than its fp32."""
    name = f"{node.name}_weight"
    yield numpy_helper.from_array(np.full((channels, 1, 2, 2), 0.25, np.float32), name)
    yield helper.make_node(
        "Conv",
        [node.input[0], name],
        node.output,
        name=node.name,
        kernel_shape=[2, 2],
        strides=[2, 2],
        pads=[0, 0, 0, 0],
        dilations=[1, 1],
        group=channels,
    )


def _is_spatial(node: NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether a mean is over height and width and keeps them as 1."""
    found = _attributes(node)
    if len(node.input) != 2 or node.input[1] not in weights or not found.get("keepdims", 1):
        return False
    axes = numpy_helper.to_array(weights[node.input[1]]).tolist()
    return sorted(axes) in ([2, 3], [-2, -1])
