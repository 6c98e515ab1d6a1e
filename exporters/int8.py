"""Static INT8 forms of a serving graph: calibration, quantisation, and the choice of blocks that stay in float.

For CPUs the graph is first rewritten in operators that onnxruntime has fast INT8 kernels for. The rewrites are exact up
to rounding and made INT8 OSNet x1.0 a quarter faster and OSNet x0.25 a third (`benchmarks/bench_runtime.py`). TensorRT
has its own fusions and takes the graph as it is.

Activations are uint8 with a zero point of their own, weights int8 per output channel in -64..64. CPUs without VNNI add
two products of uint8 and int8 in 16 bits with saturation (``vpmaddubsw``): 255 * 64 * 2 = 32,640 always fits, so every
CPU computes the same sums, whichever weights a kernel pairs. The lost bit costs accuracy, of which correcting the
biases (`_correct_biases`) returns two thirds. The ``symmetric`` form has int8 activations around zero, weights in
-127..127 and the bias left in float, as TensorRT demands, whose sums have 32 bits.

Ranges are the smallest and largest value seen (MinMax) on the site's own crops. On OSNet x0.25 adapted to the real
subset it reaches a mean cosine of 0.993 and a worst of 0.979; the 99.99th percentile 0.994 and 0.970, for three times
the time and every activation held in memory.

Which blocks stay in float, and whether the form may enter a bundle, is decided by measuring on crops that took no part
in the calibration.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantType

from resight.arrays import Pixels
from resight.errors import BundleError
from resight.machine import threads
from resight.runtime.onnx import open_session


def rewrite_for_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a serving graph for onnxruntime's INT8 kernels on CPUs.

    Args:
        model: what `resight.exporters.onnx_graph` writes, every node named; left as it is.

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


CalibrationCrops = Pixels
"""uint8 (N, H, W, 3), crops of the site, already through `resight.image.fit`."""

MIN_CROPS = 16
MAX_CALIBRATED, MAX_HELD_BACK = 128, 64  # more crops widen ranges more than they tell of the site
HOLD_BACK_EVERY = 4
BATCH = 16
# On a CPU every step between two convolutions, gates included: each way to float and back costs more than it does.
INT8_OPERATORS = {"Conv", "Gemm", "Add", "Relu", "MaxPool", "GlobalAveragePool", "Sigmoid", "Mul"}
WEIGHTED = {"Conv", "Gemm"}
TENSORRT_INT8_OPERATORS = WEIGHTED
# Its documentation: pairs before what is computed in bytes and never behind it, one for each user, weights as well.
TENSORRT_QDQ_OPTIONS = {
    "ActivationSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": sorted(TENSORRT_INT8_OPERATORS),
}


@dataclass(frozen=True, eq=False)
class CalibratedGraph:
    """A serving graph with the ranges of its tensors, from which INT8 forms are made in a second or two.

    Attributes:
        plain: as it was exported, with the shapes of its tensors; what TensorRT takes.
        suited: the same function as onnxruntime's CPU likes it.
        ranges: smallest and largest value of each float tensor of both.
        means: float64 (C,), mean of each channel of every tensor that a convolution or a Gemm of ``suited`` reads.
        blocks: the network's blocks in order, from the image to the feature.
        held_back: uint8 (M, H, W, 3), crops that took no part in the calibration.
        features: float32 (M, D), unit rows: what the fp32 graph says of them.
    """

    plain: onnx.ModelProto
    suited: onnx.ModelProto
    ranges: TensorsData
    means: dict[str, NDArray[np.float64]]
    blocks: tuple[str, ...]
    held_back: Pixels
    features: NDArray[np.float32]


def calibrate(model: bytes, crops: CalibrationCrops) -> CalibratedGraph:
    """Find the range of every tensor over three in four of the crops; the others are held back.

    Args:
        model: fp32 ONNX, as `resight.exporters.onnx_graph` writes it.
        crops: of the site, at least `MIN_CROPS`.

    Raises:
        BundleError: too few crops, or not of the model's size.
    """
    plain = onnx.load_model_from_string(model)
    fitting, held_back = split_crops(crops, plain)
    plain = onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    suited = onnx.shape_inference.infer_shapes(rewrite_for_cpu(plain), strict_mode=True)
    ranges = _collect_ranges(suited, fitting)  # every tensor of the plain graph is one of the suited graph
    means = _collect_means(suited, fitting)
    return CalibratedGraph(
        plain, suited, ranges, means, tuple(find_blocks(suited)), held_back, run_graph(model, held_back)
    )


def split_crops(crops: CalibrationCrops, model: onnx.ModelProto) -> tuple[Pixels, Pixels]:
    """Crops to calibrate on and crops to measure on, each spread over all of them.

    Raises:
        BundleError: too few, or not of the model's size.
    """
    height, width = (side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim[1:3])
    if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (height, width, 3):
        raise BundleError(
            f"INT8 needs uint8 crops (N, {height}, {width}, 3), found {crops.dtype} {crops.shape}: "
            "fit them with resight.image.fit"
        )
    if len(crops) < MIN_CROPS:
        raise BundleError(
            f"INT8 needs at least {MIN_CROPS} crops of the site to calibrate on, found {len(crops)}: "
            "give more (256 are plenty) or leave int8 out"
        )
    held = np.arange(len(crops)) % HOLD_BACK_EVERY == HOLD_BACK_EVERY - 1
    return _evenly_spaced(crops[~held], MAX_CALIBRATED), _evenly_spaced(crops[held], MAX_HELD_BACK)


def _evenly_spaced(crops: Pixels, most: int) -> Pixels:
    """At most so many of the crops, evenly spaced: neighbours are of one person or camera."""
    count = min(len(crops), most)
    return crops[np.arange(count) * len(crops) // count]


def find_blocks(model: onnx.ModelProto, computed: Collection[str] = INT8_OPERATORS) -> dict[str, tuple[str, ...]]:
    """Nodes of the operators ``computed``, by block of the network, in the order of the graph.

    A block is what a weight's name says, such as ``conv4.1`` in ``backbone.conv4.1.gate.fc1.weight``; nodes without
    weights belong to the block before them.
    """
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    blocks: dict[str, list[str]] = {}
    block = "input"
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1].startswith(("backbone.", "heads.")):
            block = _block_of(node.input[1])
        if node.op_type == "Mul" and not any(made_by.get(name) == "Sigmoid" for name in node.input):
            continue  # not a gate: scales features, once for each crop
        if node.op_type in computed:
            blocks.setdefault(block, []).append(node.name)
    return {name: tuple(nodes) for name, nodes in blocks.items()}


def _block_of(weight: str) -> str:
    """``backbone.conv4.1.gate.fc1.weight`` -> ``conv4.1``; ``backbone.conv1.weight`` -> ``conv1``."""
    first, *parts = weight.split(".")
    if first == "heads":
        return f"heads.{parts[0]}"
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def _collect_ranges(model: onnx.ModelProto, crops: Pixels) -> TensorsData:
    """Smallest and largest value of every float tensor over the crops, `BATCH` at a time."""
    with tempfile.TemporaryDirectory(prefix="resight-int8-") as folder:
        source, augmented = Path(folder) / "model.onnx", Path(folder) / "augmented.onnx"
        onnx.save_model(model, source)
        calibrator = create_calibrator(
            source, augmented_model_path=str(augmented), calibrate_method=CalibrationMethod.MinMax
        )
        # Its own session runs without any optimisation: twice the time for the same ranges.
        calibrator.infer_session = open_session(augmented.read_bytes(), threads())
        calibrator.collect_data(_CalibrationReader(model.graph.input[0].name, crops))
        ranges: TensorsData = calibrator.compute_data()
    return ranges


def _collect_means(model: onnx.ModelProto, crops: Pixels) -> dict[str, NDArray[np.float64]]:
    """Mean of each channel, over crops and places, of the tensors that convolutions and Gemms read."""
    augmented = onnx.ModelProto()
    augmented.CopyFrom(model)
    graph = augmented.graph
    rank = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    read = dict.fromkeys(node.input[0] for node in model.graph.node if node.op_type in WEIGHTED)
    for name in read:
        axes = numpy_helper.from_array(np.array([axis for axis in range(rank[name]) if axis != 1]), f"{name}_axes")
        graph.initializer.append(axes)
        graph.node.append(helper.make_node("ReduceMean", [name, axes.name], [f"{name}_mean"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{name}_mean", onnx.TensorProto.FLOAT, None))
    session, sums = open_session(augmented.SerializeToString(), threads()), dict[str, NDArray[np.float64]]()
    for batch in _batches(crops):
        found = session.run([f"{name}_mean" for name in read], {graph.input[0].name: batch})
        for name, mean in zip(read, found, strict=True):
            sums[name] = sums.get(name, np.zeros(mean.shape)) + len(batch) * mean.astype(np.float64)
    return {name: total / len(crops) for name, total in sums.items()}


class _CalibrationReader:
    """Batches of crops, as the calibrator asks for them."""

    def __init__(self, name: str, crops: Pixels) -> None:
        self.batches: Iterator[dict[str, Pixels]] = ({name: batch} for batch in _batches(crops))

    def get_next(self) -> dict[str, Pixels] | None:
        """The next batch; None after the last."""
        return next(self.batches, None)


def quantize_graph(calibrated: CalibratedGraph, *, symmetric: bool = False, keep: Collection[str] = ()) -> bytes:
    """Make an INT8 form.

    Args:
        calibrated: from `calibrate`.
        symmetric: for TensorRT.
        keep: blocks to leave in float.

    Raises:
        BundleError: an unknown block.
    """
    unknown = sorted(set(keep) - set(calibrated.blocks))
    if unknown:
        raise BundleError(f"unknown block {unknown[0]!r} to keep in float: choose among {', '.join(calibrated.blocks)}")
    model = onnx.ModelProto()
    model.CopyFrom(calibrated.plain if symmetric else calibrated.suited)  # the quantizer writes into it
    blocks = find_blocks(model, TENSORRT_INT8_OPERATORS if symmetric else INT8_OPERATORS)
    chosen = [node for block, nodes in blocks.items() if block not in keep for node in nodes]
    if chosen:  # an empty list would mean every node
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=not symmetric,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            tensors_range=calibrated.ranges,
            nodes_to_quantize=chosen,
            nodes_to_exclude=[],
            op_types_to_quantize=sorted(INT8_OPERATORS),
            extra_options={"WeightSymmetric": True} | (TENSORRT_QDQ_OPTIONS if symmetric else {}),
        )
        with _quiet_quantizer():
            quantizer.quantize_model()
        quantizer.model.topological_sort()  # it puts what it adds behind its users
        model = quantizer.model.model
        if not symmetric:
            _correct_biases(model, calibrated)
    model.graph.ClearField("value_info")
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # "here", said aloud; a bundle's reader accepts no word of places
    model.producer_name = calibrated.plain.producer_name
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _correct_biases(model: onnx.ModelProto, calibrated: CalibratedGraph) -> None:
    """Add to each bias what rounding the weights takes from the mean output: the sum over inputs of (W - Wq) E[x].

    Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV 2019), Eq. 13-17, with
    the mean input measured instead of derived. Of OSNet x0.25's mean cosine to fp32 on market-subset, 0.9922 with
    weights of 8 bits, 7 bits leave 0.9863 and 7 bits with corrected biases 0.9905.
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in calibrated.suited.graph.initializer}
    plain = {node.name: node for node in calibrated.suited.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantised = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED or not {*node.input[1:]} <= dequantised.keys() or len(node.input) < 3:
            continue  # left in float, or without a bias
        weight, weight_scale, bias, bias_scale = (
            numpy_helper.to_array(tensors[name]) for output in node.input[1:] for name in dequantised[output].input[:2]
        )
        rounded = weight * weight_scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
        lost = weights[plain[node.name].input[1]] - rounded
        lost = lost.reshape(*weight.shape[:2], -1).sum(2)  # (O, I / groups)
        mean = calibrated.means[plain[node.name].input[0]].reshape(-1, lost.shape[1])  # (groups, I / groups)
        steps = np.rint((lost * np.repeat(mean, len(lost) // len(mean), axis=0)).sum(1) / bias_scale.reshape(-1))
        limits, name = np.iinfo(np.int32), dequantised[node.input[2]].input[0]
        corrected = np.clip(bias + steps, limits.min, limits.max).astype(np.int32)
        tensors[name].CopyFrom(numpy_helper.from_array(corrected, name))


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Keep what the library tells the root logger of every bias and scale from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def run_graph(model: bytes, crops: Pixels) -> NDArray[np.float32]:
    """Features (N, D) of crops on the CPU, `BATCH` at a time."""
    session = open_session(model, threads())
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in _batches(crops)])


def _batches(crops: Pixels) -> Iterator[Pixels]:
    return (crops[start : start + BATCH] for start in range(0, len(crops), BATCH))


MAX_KEPT_BLOCKS = 32  # crops a block is judged by; only an order of blocks hangs on it
Progress = Callable[[str], None]
"""Called with what begins."""


@dataclass(frozen=True)
class Int8Criteria:
    """What an INT8 form must hold to enter a bundle.

    Attributes:
        min_mean_cosine: mean cosine similarity to fp32 on held-back crops, at least.
        max_map_loss: mAP, 0..1, that may be lost against fp32.
        min_speedup: throughput against fp32 on this machine, at least.
    """

    min_mean_cosine: float = 0.98
    max_map_loss: float = 0.01
    min_speedup: float = 1.0


@dataclass(frozen=True, eq=False)
class Int8Form:
    """An INT8 form and how near it is to fp32 on crops it was not calibrated on.

    Attributes:
        model: serialised ONNX, QDQ.
        kept: blocks left in float, the most sensitive first.
        mean_cosine: of the features of the two forms.
        min_cosine: the worst crop's.
        crops: how many were compared.
    """

    model: bytes
    kept: tuple[str, ...]
    mean_cosine: float
    min_cosine: float
    crops: int


def keep_sensitive(
    calibrated: CalibratedGraph,
    *,
    symmetric: bool = False,
    gate: Int8Criteria | None = None,
    progress: Progress | None = None,
) -> Int8Form:
    """Make an INT8 form, with blocks kept in float only where the gate asks for it.

    If all of it in INT8 is near enough, nothing is kept. Else each block alone is put in INT8 to see what it costs,
    and the 1, 2, 4, ... costliest are kept until the gate is met, nothing gains any more, or half of the blocks are
    in float: with more there would be nothing left of the speed. So at most B + log2(B) + 1 forms of B blocks are
    tried (OSNet 11, ResNet-18 9, ResNet-50 17), each for a second or three.

    Args:
        calibrated: one calibration serves both forms.
        symmetric: for TensorRT.
        gate: whose `min_mean_cosine` is aimed at.
        progress: told what begins.
    """
    wanted = (gate or Int8Criteria()).min_mean_cosine
    best = _measure_int8(calibrated, symmetric, ())
    if best.mean_cosine >= wanted:
        return best
    costs = {}
    for block in calibrated.blocks:
        if progress is not None:
            progress(f"trying {block}")
        costs[block] = _cosine_cost(calibrated, symmetric, block)
    order = sorted(costs, key=lambda block: (-costs[block], block))
    count = 1
    while best.mean_cosine < wanted and count <= len(order) // 2:
        if progress is not None:
            progress(f"keeping {count} blocks in float")
        found = _measure_int8(calibrated, symmetric, tuple(order[:count]))
        if found.mean_cosine <= best.mean_cosine:
            break
        best = found
        count *= 2
    return best


def _measure_int8(calibrated: CalibratedGraph, symmetric: bool, keep: tuple[str, ...]) -> Int8Form:
    """A form and its cosines on the crops held back."""
    model = quantize_graph(calibrated, symmetric=symmetric, keep=keep)
    cosines = _cosines(run_graph(model, calibrated.held_back), calibrated.features)
    return Int8Form(model, keep, float(cosines.mean()), float(cosines.min()), len(cosines))


def _cosine_cost(calibrated: CalibratedGraph, symmetric: bool, block: str) -> float:
    """What one block alone in INT8 takes from the mean cosine."""
    others = [other for other in calibrated.blocks if other != block]
    model = quantize_graph(calibrated, symmetric=symmetric, keep=others)
    crops = calibrated.held_back[:MAX_KEPT_BLOCKS]
    return 1.0 - float(_cosines(run_graph(model, crops), calibrated.features[: len(crops)]).mean())


def _cosines(features: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row; what is not a number is as wrong as can be."""
    cosines: NDArray[np.float64] = (features.astype(np.float64) * wanted).sum(1)
    return np.nan_to_num(cosines, nan=-1.0)


def check_int8(
    gate: Int8Criteria,
    *,
    mean_cosine: float,
    map_before: float | None = None,
    map_after: float | None = None,
    speedup: float | None = None,
) -> str:
    """Say why an INT8 form may not enter the bundle.

    Args:
        gate: what is asked of it.
        mean_cosine: to fp32, on crops it was not calibrated on.
        map_before: mAP of fp32, 0..1; None where no labelled set was given.
        map_after: mAP of the form.
        speedup: its throughput against fp32's on this machine; None where that must not decide, because the form is
            meant for another machine or was asked for by name.

    Returns:
        The reason with its figures; empty: it may enter.
    """
    if not mean_cosine >= gate.min_mean_cosine:
        return f"mean cosine to fp32 {mean_cosine:.4f} on crops not calibrated on, under {gate.min_mean_cosine}"
    if map_before is not None and map_after is not None:
        lost = map_before - map_after
        if not lost <= gate.max_map_loss + 1e-9:  # 0.50 less 0.49 is a trifle more than 0.01 in binary
            return (
                f"mAP {100 * map_after:.1f} against {100 * map_before:.1f} of fp32: {100 * lost:.1f} lost, "
                f"more than {100 * gate.max_map_loss:g}"
            )
    if speedup is not None and not speedup >= gate.min_speedup:
        return f"{speedup:.2f} of the speed of fp32 on this machine, under {gate.min_speedup:g}"
    return ""
