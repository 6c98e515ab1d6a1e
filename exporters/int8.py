"""Static INT8 forms of a serving graph: calibration, quantisation, and the choice of blocks that stay in float.

For CPUs the graph is first rewritten with operators for which onnxruntime has fast INT8 kernels. The rewrites are exact
up to rounding and made INT8 OSNet x1.0 a quarter faster and OSNet x0.25 a third (`benchmarks/bench_runtime.py`).
TensorRT has its own fusions and gets the original graph.

Activations are uint8 with a zero point of their own, weights int8 per output channel in -64..64. CPUs without VNNI add
two products of uint8 and int8 in 16 bits with saturation (``vpmaddubsw``): 255 * 64 * 2 = 32,640 always fits, so every
CPU computes the same sums, whichever weights a kernel pairs. The lost bit costs accuracy; correcting the biases
(`_correct_biases`) recovers two thirds of it. The ``symmetric`` form has int8 activations around zero, weights in
-127..127 and the bias in float, as TensorRT requires; its sums have 32 bits.

Ranges are the smallest and largest value seen (MinMax) on the site's own crops. On OSNet x0.25 adapted to the real
subset MinMax reaches a mean cosine of 0.993 and a worst of 0.979; the 99.99th percentile reaches 0.994 and 0.970, but
takes three times as long and holds every activation in memory.

Crops held back from the calibration decide which blocks stay in float and whether the form is added to the bundle.
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
        model: written by `resight.exporters.onnx_graph`, every node named; not modified.

    Returns:
        A model with the same input and output; node names are kept.
    """
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    channels: dict[str, int] = {}  # of a tensor, from the last convolution before it
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
    return rewritten


def _attributes(node: NodeProto) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _is_stem(node: NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether a convolution is 7x7 with stride 2 and padding 3 over an image of even sides."""
    found = _attributes(node)
    sides = [side.dim_value for side in graph.input[0].type.tensor_type.shape.dim[1:3]]
    expected = {"kernel_shape": [7, 7], "strides": [2, 2], "pads": [3, 3, 3, 3], "group": 1, "dilations": [1, 1]}
    return all(found.get(name) == value for name, value in expected.items()) and all(side % 2 == 0 for side in sides)


def _fold_stem(node: NodeProto, weights: dict[str, onnx.TensorProto]) -> Iterator[NodeProto | onnx.TensorProto]:
    """7x7 with stride 2 over 3 channels -> 4x4 over the 12 channels of 2x2 blocks.

    onnxruntime copies INT8 patches one run of channels at a time, and with runs of 3 bytes that is nearly all overhead.
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
    """2x2 average pool -> a depthwise convolution; onnxruntime's INT8 pooling is slower than its fp32 pooling."""
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
"""uint8 (N, H, W, 3), crops of the site, fitted by `resight.image.fit`."""

MIN_CROPS = 16
MAX_CALIBRATED, MAX_HELD_BACK = 128, 64  # more crops add outliers to the ranges, not accuracy
HOLD_BACK_EVERY = 4
BATCH = 16
# On a CPU every operator between two convolutions, gates included: converting to float and back costs more than the
# operator itself.
INT8_OPERATORS = {"Conv", "Gemm", "Add", "Relu", "MaxPool", "GlobalAveragePool", "Sigmoid", "Mul"}
WEIGHTED = {"Conv", "Gemm"}
TENSORRT_INT8_OPERATORS = WEIGHTED
# TensorRT's documentation: Q/DQ pairs before an INT8 operator and never behind it, one pair per user, also for weights.
TENSORRT_QDQ_OPTIONS = {
    "ActivationSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": sorted(TENSORRT_INT8_OPERATORS),
}


@dataclass(frozen=True, eq=False)
class CalibratedGraph:
    """A serving graph with the ranges of its tensors; making an INT8 form from it takes a second or two.

    Attributes:
        original: as exported, with the shapes of its tensors; for TensorRT.
        rewritten: the same function after `rewrite_for_cpu`.
        ranges: smallest and largest value of each float tensor of both.
        means: float64 (C,), mean of each channel of every tensor that a convolution or a Gemm of ``rewritten`` reads.
        blocks: the network's blocks in order, from the image to the feature.
        held_back: uint8 (M, H, W, 3), crops that took no part in the calibration.
        features: float32 (M, D), unit rows: the fp32 graph's features of the held-back crops.
    """

    original: onnx.ModelProto
    rewritten: onnx.ModelProto
    ranges: TensorsData
    means: dict[str, NDArray[np.float64]]
    blocks: tuple[str, ...]
    held_back: Pixels
    features: NDArray[np.float32]


def calibrate(model: bytes, crops: CalibrationCrops) -> CalibratedGraph:
    """Measure the range of every tensor over three quarters of the crops; the others are held back.

    Args:
        model: fp32 ONNX, as `resight.exporters.onnx_graph` writes it.
        crops: of the site, at least `MIN_CROPS`.

    Raises:
        BundleError: too few crops, or not of the model's size.
    """
    original = onnx.load_model_from_string(model)
    fitting, held_back = split_crops(crops, original)
    original = onnx.shape_inference.infer_shapes(original, strict_mode=True)
    rewritten = onnx.shape_inference.infer_shapes(rewrite_for_cpu(original), strict_mode=True)
    ranges = _collect_ranges(rewritten, fitting)  # every tensor of the original graph is one of the rewritten graph
    means = _collect_means(rewritten, fitting)
    return CalibratedGraph(
        original, rewritten, ranges, means, tuple(find_blocks(rewritten)), held_back, run_graph(model, held_back)
    )


def split_crops(crops: CalibrationCrops, model: onnx.ModelProto) -> tuple[Pixels, Pixels]:
    """Split crops into those to calibrate on and those to measure on, each spread evenly over all crops.

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
    """At most ``most`` of the crops, evenly spaced: adjacent crops show the same person or camera."""
    count = min(len(crops), most)
    return crops[np.arange(count) * len(crops) // count]


def find_blocks(model: onnx.ModelProto, computed: Collection[str] = INT8_OPERATORS) -> dict[str, tuple[str, ...]]:
    """Nodes whose operators are in ``computed``, by block of the network, in the order of the graph.

    A block is a part of a weight's name, such as ``conv4.1`` in ``backbone.conv4.1.gate.fc1.weight``; nodes without
    weights belong to the block before them.
    """
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    blocks: dict[str, list[str]] = {}
    block = "input"
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1].startswith(("backbone.", "heads.")):
            block = _block_of(node.input[1])
        if node.op_type == "Mul" and not any(made_by.get(name) == "Sigmoid" for name in node.input):
            continue  # not a gate: scales the final feature, once per crop
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
        # The calibrator's own session disables graph optimisation: same ranges in twice the time.
        calibrator.infer_session = open_session(augmented.read_bytes(), threads())
        calibrator.collect_data(_CalibrationReader(model.graph.input[0].name, crops))
        ranges: TensorsData = calibrator.compute_data()
    return ranges


def _collect_means(model: onnx.ModelProto, crops: Pixels) -> dict[str, NDArray[np.float64]]:
    """Mean of each channel, over crops and positions, of the input tensors of convolutions and Gemms."""
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
    """Batches of crops in onnxruntime's ``CalibrationDataReader`` interface."""

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
    model.CopyFrom(calibrated.original if symmetric else calibrated.rewritten)  # quantised in place
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
        quantizer.model.topological_sort()  # the quantizer appends its nodes behind their users
        model = quantizer.model.model
        if not symmetric:
            _correct_biases(model, calibrated)
    model.graph.ClearField("value_info")
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # the default value set explicitly; `check_graph` rejects any data location
    model.producer_name = calibrated.original.producer_name
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _correct_biases(model: onnx.ModelProto, calibrated: CalibratedGraph) -> None:
    """Add to each bias the mean output lost by rounding the weights: the sum over inputs of (W - Wq) E[x].

    Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV 2019), Eq. 13-17, with
    the mean input measured instead of derived. Mean cosine to fp32 of OSNet x0.25 on market-subset: 0.9922 with
    8-bit weights, 0.9863 with 7 bits, 0.9905 with 7 bits and corrected biases.
    """
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in calibrated.rewritten.graph.initializer}
    nodes = {node.name: node for node in calibrated.rewritten.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantised = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED or not {*node.input[1:]} <= dequantised.keys() or len(node.input) < 3:
            continue  # kept in float, or without a bias
        weight, weight_scale, bias, bias_scale = (
            numpy_helper.to_array(tensors[name]) for output in node.input[1:] for name in dequantised[output].input[:2]
        )
        rounded = weight * weight_scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
        lost = weights[nodes[node.name].input[1]] - rounded
        lost = lost.reshape(*weight.shape[:2], -1).sum(2)  # (O, I / groups)
        mean = calibrated.means[nodes[node.name].input[0]].reshape(-1, lost.shape[1])  # (groups, I / groups)
        steps = np.rint((lost * np.repeat(mean, len(lost) // len(mean), axis=0)).sum(1) / bias_scale.reshape(-1))
        limits, name = np.iinfo(np.int32), dequantised[node.input[2]].input[0]
        corrected = np.clip(bias + steps, limits.min, limits.max).astype(np.int32)
        tensors[name].CopyFrom(numpy_helper.from_array(corrected, name))


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Suppress the library's log messages to the root logger about every bias and scale."""
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


MAX_SENSITIVITY_CROPS = 32  # per block; they only decide the order of the blocks
Progress = Callable[[str], None]
"""Called with the name of a step when it begins."""


@dataclass(frozen=True)
class Int8Criteria:
    """The criteria an INT8 form must meet to be added to a bundle.

    Attributes:
        min_mean_cosine: smallest accepted mean cosine similarity to fp32 on held-back crops.
        max_map_loss: largest accepted loss of mAP, 0..1, against fp32.
        min_speedup: smallest accepted throughput relative to fp32 on this machine.
    """

    min_mean_cosine: float = 0.98
    max_map_loss: float = 0.01
    min_speedup: float = 1.0


@dataclass(frozen=True, eq=False)
class Int8Form:
    """An INT8 form and its similarity to fp32 on crops it was not calibrated on.

    Attributes:
        model: serialised ONNX, QDQ.
        kept: blocks kept in float, the most sensitive first.
        mean_cosine: mean over crops of the cosine between the features of the two forms.
        min_cosine: the worst crop's cosine.
        crops: number of crops compared.
    """

    model: bytes
    kept: tuple[str, ...]
    mean_cosine: float
    min_cosine: float
    crops: int


def keep_sensitive_blocks(
    calibrated: CalibratedGraph,
    *,
    symmetric: bool = False,
    criteria: Int8Criteria | None = None,
    progress: Progress | None = None,
) -> Int8Form:
    """Make an INT8 form that keeps as few blocks in float as its accuracy allows.

    If the graph with all blocks in INT8 is accurate enough, no block is kept. Otherwise each block alone is quantised
    to measure its cost, and the 1, 2, 4, ... costliest are kept until the criterion is met, the accuracy no longer
    improves, or half of the blocks are in float: with more, INT8 would not be faster. At most B + log2(B) + 1 forms
    of B blocks are tried (OSNet 11, ResNet-18 9, ResNet-50 17), each for one to three seconds.

    Args:
        calibrated: one calibration serves both forms.
        symmetric: make the form for TensorRT.
        criteria: its `min_mean_cosine` is the target.
        progress: called with each step.
    """
    required = (criteria or Int8Criteria()).min_mean_cosine
    best = _measure_int8(calibrated, symmetric, ())
    if best.mean_cosine >= required:
        return best
    costs = {}
    for block in calibrated.blocks:
        if progress is not None:
            progress(f"trying {block}")
        costs[block] = _cosine_cost(calibrated, symmetric, block)
    order = sorted(costs, key=lambda block: (-costs[block], block))
    count = 1
    while best.mean_cosine < required and count <= len(order) // 2:
        if progress is not None:
            progress(f"keeping {count} blocks in float")
        found = _measure_int8(calibrated, symmetric, tuple(order[:count]))
        if found.mean_cosine <= best.mean_cosine:
            break
        best = found
        count *= 2
    return best


def _measure_int8(calibrated: CalibratedGraph, symmetric: bool, keep: tuple[str, ...]) -> Int8Form:
    """Make an INT8 form and measure its cosines on the held-back crops."""
    model = quantize_graph(calibrated, symmetric=symmetric, keep=keep)
    cosines = _cosines(run_graph(model, calibrated.held_back), calibrated.features)
    return Int8Form(model, keep, float(cosines.mean()), float(cosines.min()), len(cosines))


def _cosine_cost(calibrated: CalibratedGraph, symmetric: bool, block: str) -> float:
    """Loss of mean cosine if only this block is in INT8."""
    others = [other for other in calibrated.blocks if other != block]
    model = quantize_graph(calibrated, symmetric=symmetric, keep=others)
    crops = calibrated.held_back[:MAX_SENSITIVITY_CROPS]
    return 1.0 - float(_cosines(run_graph(model, crops), calibrated.features[: len(crops)]).mean())


def _cosines(features: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each pair of rows; NaN counts as -1, the worst value."""
    cosines: NDArray[np.float64] = (features.astype(np.float64) * expected).sum(1)
    return np.nan_to_num(cosines, nan=-1.0)


def check_int8(
    criteria: Int8Criteria,
    *,
    mean_cosine: float,
    map_before: float | None = None,
    map_after: float | None = None,
    speedup: float | None = None,
) -> str:
    """Check an INT8 form against the criteria.

    Args:
        criteria: the limits.
        mean_cosine: to fp32, on crops it was not calibrated on.
        map_before: mAP of fp32, 0..1; None without a labelled set.
        map_after: mAP of the form.
        speedup: its throughput relative to fp32's on this machine; None if speed must not decide, because the form
            is for another machine or was requested by name.

    Returns:
        The reason for rejecting the form, with numbers; empty if it is accepted.
    """
    if not mean_cosine >= criteria.min_mean_cosine:
        return f"mean cosine to fp32 {mean_cosine:.4f} on crops not calibrated on, under {criteria.min_mean_cosine}"
    if map_before is not None and map_after is not None:
        lost = map_before - map_after
        if not lost <= criteria.max_map_loss + 1e-9:  # in binary, 0.50 - 0.49 is slightly more than 0.01
            return (
                f"mAP {100 * map_after:.1f} against {100 * map_before:.1f} of fp32: {100 * lost:.1f} lost, "
                f"more than {100 * criteria.max_map_loss:g}"
            )
    if speedup is not None and not speedup >= criteria.min_speedup:
        return f"{speedup:.2f} of the speed of fp32 on this machine, under {criteria.min_speedup:g}"
    return ""
