"""Calibration, and graphs with quantisation and dequantisation nodes (QDQ) around what may be computed in bytes.

Activations are uint8 with a zero point of their own, weights int8 per output channel in -64..64. CPUs without VNNI add
two products of uint8 and int8 in 16 bits with saturation (``vpmaddubsw``): 255 * 64 * 2 = 32,640 always fits, so every
CPU computes the same sums, whichever weights a kernel pairs. The bit costs accuracy, of which correcting the biases
(`_correct_biases`) returns two thirds. The ``symmetric`` form has int8 activations around zero, weights in -127..127
and the bias left in float, as TensorRT demands, whose sums have 32 bits.

Ranges are the smallest and largest value seen (MinMax) on the site's own crops. On OSNet x0.25 adapted to the real
subset it reaches a mean cosine of 0.993 and a worst of 0.979; the 99.99th percentile 0.994 and 0.970, for three times
the time and every activation held in memory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantType

from resight.cpu_session import open_session
from resight.errors import BundleError
from resight.exporters.int8_graph import suit_cpu
from resight.image import Pixels
from resight.machine import threads

CalibrationCrops = Pixels
"""uint8 (N, H, W, 3), crops of the site, already through `resight.image.fit`."""

MIN_CROPS = 16
MAX_CALIBRATED, MAX_HELD_BACK = 128, 64  # more crops widen ranges more than they tell of the site
HOLD_BACK_EVERY = 4
BATCH = 16
# On a CPU every step between two convolutions, gates included: each way to float and back costs more than it does.
COMPUTED = {"Conv", "Gemm", "Add", "Relu", "MaxPool", "GlobalAveragePool", "Sigmoid", "Mul"}
WEIGHTED = {"Conv", "Gemm"}
COMPUTED_BY_TENSORRT = WEIGHTED
# Its documentation: pairs before what is computed in bytes and never behind it, one for each user, weights as well.
FOR_TENSORRT = {
    "ActivationSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": sorted(COMPUTED_BY_TENSORRT),
}


@dataclass(frozen=True, eq=False)
class Calibrated:
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


def calibrate(model: bytes, crops: CalibrationCrops) -> Calibrated:
    """Find the range of every tensor over three in four of the crops; the others are held back.

    Args:
        model: fp32 ONNX, as `resight.exporters.to_onnx` writes it.
        crops: of the site, at least `MIN_CROPS`.

    Raises:
        BundleError: too few crops, or not of the model's size.
    """
    plain = onnx.load_model_from_string(model)
    fitting, held_back = split(crops, plain)
    plain = onnx.shape_inference.infer_shapes(plain, strict_mode=True)
    suited = onnx.shape_inference.infer_shapes(suit_cpu(plain), strict_mode=True)
    ranges = _collect_ranges(suited, fitting)  # every tensor of the plain graph is one of the suited graph
    means = _collect_means(suited, fitting)
    return Calibrated(plain, suited, ranges, means, tuple(find_blocks(suited)), held_back, run(model, held_back))


def split(crops: CalibrationCrops, model: onnx.ModelProto) -> tuple[Pixels, Pixels]:
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
    return _spread(crops[~held], MAX_CALIBRATED), _spread(crops[held], MAX_HELD_BACK)


def _spread(crops: Pixels, most: int) -> Pixels:
    """At most so many of the crops, evenly spaced: neighbours are of one person or camera."""
    count = min(len(crops), most)
    return crops[np.arange(count) * len(crops) // count]


def find_blocks(model: onnx.ModelProto, computed: Collection[str] = COMPUTED) -> dict[str, tuple[str, ...]]:
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
        calibrator.collect_data(_Reader(model.graph.input[0].name, crops))
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


class _Reader:
    """Batches of crops, as the calibrator asks for them."""

    def __init__(self, name: str, crops: Pixels) -> None:
        self.batches: Iterator[dict[str, Pixels]] = ({name: batch} for batch in _batches(crops))

    def get_next(self) -> dict[str, Pixels] | None:
        """The next batch; None after the last."""
        return next(self.batches, None)


def apply(calibrated: Calibrated, *, symmetric: bool = False, keep: Collection[str] = ()) -> bytes:
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
    blocks = find_blocks(model, COMPUTED_BY_TENSORRT if symmetric else COMPUTED)
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
            op_types_to_quantize=sorted(COMPUTED),
            extra_options={"WeightSymmetric": True} | (FOR_TENSORRT if symmetric else {}),
        )
        with _quiet():
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


def _correct_biases(model: onnx.ModelProto, calibrated: Calibrated) -> None:
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
def _quiet() -> Iterator[None]:
    """Keep what the library tells the root logger of every bias and scale from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def run(model: bytes, crops: Pixels) -> NDArray[np.float32]:
    """Features (N, D) of crops on the CPU, `BATCH` at a time."""
    session = open_session(model, threads())
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in _batches(crops)])


def _batches(crops: Pixels) -> Iterator[Pixels]:
    return (crops[start : start + BATCH] for start in range(0, len(crops), BATCH))
