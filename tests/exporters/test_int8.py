"""INT8 forms: similar to fp32 on held-out crops, deterministic, with correctly measured losses."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import CONFIGS, SPEC, cosines, draw_crops, export, make_encoder
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from resight.arrays import Pixels
from resight.encoder.model import Encoder
from resight.errors import BundleError
from resight.exporters import int8
from resight.exporters.int8 import Int8Criteria, check_int8, keep_sensitive_blocks, rewrite_for_cpu
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.exporters.verify import run_onnx
from resight.image import ImageSpec
from resight.runtime.onnx import open_session

pytestmark = pytest.mark.long

BLOCKS = ("conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1")


@cache
def calibrated(name: str) -> int8.CalibratedGraph:
    return int8.calibrate(export(name), draw_crops())


@cache
def form(name: str, symmetric: bool) -> onnx.ModelProto:
    return onnx.load_model_from_string(int8.quantize_graph(calibrated(name), symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True], ids=["cpu", "tensorrt"])
@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_int8_is_near_fp32_on_held_out_crops(name: str, symmetric: bool) -> None:
    made = keep_sensitive_blocks(calibrated(name), symmetric=symmetric, criteria=Int8Criteria(min_mean_cosine=0.95))
    assert made.kept == () and made.crops == 32
    assert made.mean_cosine >= (
        0.98 if name == "osnet_x0_25" else 0.95
    )  # random weights lose more accuracy than trained ones
    crops = draw_crops(32, seed=77)
    found, expected = run_onnx(made.model)(crops), run_onnx(export(name))(crops)
    assert abs(cosines(found, expected).mean() - made.mean_cosine) < 0.01
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert (expected @ expected.T).min() < 0.9  # features of different crops differ


@pytest.mark.parametrize("width", [32, 33])
def test_the_rewritten_graph_computes_the_same_function(width: int) -> None:
    spec = ImageSpec(64, width)
    encoder = Encoder(dataclasses.replace(make_encoder("osnet_x0_25").config, image=spec)).eval()
    encoder.load_state_dict(make_encoder("osnet_x0_25").state_dict())
    data = export("osnet_x0_25") if spec == SPEC else to_onnx(ServingGraph(encoder), spec)
    plain = onnx.load_model_from_string(data)
    suited = rewrite_for_cpu(plain)
    assert plain.SerializeToString(deterministic=True) == data  # not modified
    operators = [node.op_type for node in suited.graph.node]
    assert operators.count("SpaceToDepth") == (width % 2 == 0)  # for odd image sizes the first layer is not rewritten
    assert operators.count("GlobalAveragePool") == 24 and "AveragePool" not in operators
    crops = draw_crops(9, spec)
    np.testing.assert_allclose(run_onnx(suited.SerializeToString())(crops), run_onnx(data)(crops), atol=2e-6)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_the_cpu_form_is_uint8_by_int8_per_channel(name: str) -> None:
    model, values = form(name, False), constants(form(name, False))
    made_by = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            activation, weight = made_by[node.input[0]], made_by[node.input[1]]
            assert values[activation.input[2]].dtype == np.uint8
            assert values[weight.input[0]].dtype == np.int8
            assert len(values[weight.input[1]]) == len(values[weight.input[0]])  # one scale per output channel
    assert not model.functions and {opset.domain for opset in model.opset_import} == {""}


def saturating_sums(activations: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """(M, K) x (K, N) as kernels without VNNI compute it: two products are added in 16 bits (`vpmaddubsw`)."""
    total = np.zeros((len(activations), weights.shape[1]), np.int64)
    for k in range(0, len(weights), 2):
        pair = activations[:, k : k + 2] @ weights[k : k + 2]
        total += np.clip(pair, -(2**15), 2**15 - 1)
    return total


def patches(values: NDArray[np.uint8], node: onnx.NodeProto, zero: int) -> NDArray[np.int64]:
    """(B, C, h, w) -> (places, kh kw C), in the order of onnxruntime's kernels: channels innermost."""
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    (kh, kw), (top, left, bottom, right), (down, across) = (found[key] for key in ("kernel_shape", "pads", "strides"))
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), (2, 3))[:, :, ::down, ::across]
    return windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, kh * kw * values.shape[1]).astype(np.int64)


def sums_with_and_without_vnni(model: onnx.ModelProto, crops: Pixels) -> Iterator[tuple[str, bool]]:
    """Name of each dense convolution, and whether both kinds of kernel compute the same sums on its input."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    values, made_by = constants(model), {name: node for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    dense = [node for node in convolutions if {a.name: a.i for a in node.attribute}.get("group", 1) == 1]
    read = {node.name: made_by[node.input[0]] for node in dense}
    for name in dict.fromkeys(node.input[0] for node in read.values()):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    session = open_session(model.SerializeToString(), 1)
    found = dict(zip([out.name for out in session.get_outputs()], session.run(None, {"images": crops}), strict=True))
    for node in dense:
        zero = int(values[read[node.name].input[2]])
        weight = values[made_by[node.input[1]].input[0]].astype(np.int64)
        flat = weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
        seen = patches(found[read[node.name].input[0]], node, zero)[:256]
        yield node.name, np.array_equal(saturating_sums(seen, flat), seen @ flat)


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_cpus_without_vnni_compute_the_same_sums(name: str) -> None:
    """With 8-bit weights they do not: the emulation reproduces the overflow on such CPUs."""
    crops = draw_crops(4, seed=77)
    assert all(same for _, same in sums_with_and_without_vnni(form(name, False), crops))
    wide = onnx.ModelProto.FromString(form(name, False).SerializeToString())
    for tensor in wide.graph.initializer:  # the same scales, twice the weights: the full range
        if tensor.data_type == TensorProto.INT8 and tensor.name.endswith("_quantized"):
            doubled = np.clip(numpy_helper.to_array(tensor).astype(np.int16) * 2, -127, 127).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(doubled, tensor.name))
    assert not all(same for _, same in sums_with_and_without_vnni(wide, crops))


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_no_pair_of_products_overflows_16_bits(name: str) -> None:
    values, graph = constants(form(name, False)), form(name, False).graph
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = values[made_by[node.input[1]].input[0]].astype(int)
            assert np.abs(weight).max() * 255 * 2 < 2**15
            assert np.abs(weight).max() == 64 or weight.shape[1:] == (1, 2, 2)  # all averages are equal


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_corrected_biases_improve_the_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = draw_crops(64, seed=77)
    expected = run_onnx(export(name))(crops)
    corrected = cosines(run_onnx(int8.quantize_graph(calibrated(name)))(crops), expected).mean()
    with monkeypatch.context() as patch:
        patch.setattr(int8, "_correct_biases", lambda model, calibrated: None)
        plain = cosines(run_onnx(int8.quantize_graph(calibrated(name)))(crops), expected).mean()
    assert 1 - corrected < 0.95 * (1 - plain)


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_the_form_for_tensorrt_is_symmetric_with_few_operators(name: str) -> None:
    model, values = form(name, True), constants(form(name, True))
    made_by = {output: node for node in model.graph.node for output in node.output}
    assert [node.op_type for node in model.graph.node if "images" in node.input] == ["Cast"]
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs and all(values[node.input[2]].dtype == np.int8 and not values[node.input[2]].any() for node in pairs)
    assert not any(tensor.data_type == TensorProto.INT32 for tensor in model.graph.initializer)  # biases are float
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert [made_by[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        if node.op_type == "QuantizeLinear" and node.input[0] in made_by:
            assert made_by[node.input[0]].op_type != "Conv" or "Relu" not in {
                reader.op_type for reader in model.graph.node if node.output[0] in reader.input
            }


def test_quantisation_is_silent_and_deterministic_across_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, crops = export("osnet_x0_25"), draw_crops(32)
    with caplog.at_level(logging.WARNING):
        mine = [
            hashlib.sha256(int8.quantize_graph(int8.calibrate(model, crops), symmetric=symmetric)).hexdigest()
            for symmetric in (False, True)
        ]
    assert capfd.readouterr() == ("", "") and not caplog.records
    (tmp_path / "model.onnx").write_bytes(model)
    np.save(tmp_path / "crops.npy", crops)
    program = (
        "import hashlib, numpy, pathlib; from resight.exporters import int8\n"
        "model, crops = pathlib.Path('model.onnx').read_bytes(), numpy.load('crops.npy')\n"
        "for symmetric in (False, True):\n"
        "    made = int8.quantize_graph(int8.calibrate(model, crops), symmetric=symmetric)\n"
        "    print(hashlib.sha256(made).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == mine and done.stderr == ""


def brittle_encoder() -> Encoder:
    """Scale one channel inside layer2.0 by ten thousand and its weights inversely: the same function."""
    encoder = Encoder(CONFIGS["resnet18"])
    encoder.load_state_dict(make_encoder("resnet18").state_dict())
    block = encoder.backbone.layer2[0]
    with torch.no_grad():
        block.bn1.weight[0] *= 1e4
        block.bn1.bias[0] *= 1e4
        block.conv2.weight[:, 0] /= 1e4
    return encoder.eval()


def test_a_block_that_int8_breaks_is_kept_in_float() -> None:
    model = to_onnx(ServingGraph(brittle_encoder()), SPEC)
    found = int8.calibrate(model, draw_crops())
    assert found.blocks == BLOCKS
    whole = keep_sensitive_blocks(found, criteria=Int8Criteria(min_mean_cosine=-1.0))
    steps: list[str] = []
    required = keep_sensitive_blocks(calibrated("resnet18")).mean_cosine - 0.01
    assert whole.mean_cosine < required  # broken, so the test is meaningful
    made = keep_sensitive_blocks(found, criteria=Int8Criteria(min_mean_cosine=required), progress=steps.append)
    assert made.kept == ("layer2.0",) and made.mean_cosine >= required
    assert steps == [*(f"trying {block}" for block in BLOCKS), "keeping 1 blocks in float"]
    assert made.model == int8.quantize_graph(found, keep=["layer2.0"])
    crops = draw_crops(32, seed=77)
    mean = cosines(run_onnx(made.model)(crops), run_onnx(model)(crops)).mean()
    assert abs(mean - made.mean_cosine) < 0.01  # the measurement generalises to other crops


def test_unreachable_criteria_keep_at_most_half_of_the_blocks() -> None:
    steps: list[str] = []
    made = keep_sensitive_blocks(
        int8.calibrate(export("resnet18"), draw_crops(48)),
        criteria=Int8Criteria(min_mean_cosine=1.1),
        progress=steps.append,
    )
    assert steps[0] == f"trying {BLOCKS[0]}" and len(steps) <= len(BLOCKS) + 3
    assert 0 < len(made.kept) <= len(BLOCKS) // 2 and made.mean_cosine < 1.1


def test_with_all_blocks_kept_features_equal_fp32() -> None:
    data = int8.quantize_graph(calibrated("resnet18"), keep=BLOCKS)
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load_model_from_string(data).graph.node}
    crops = draw_crops(8)
    np.testing.assert_allclose(run_onnx(data)(crops), run_onnx(export("resnet18"))(crops), atol=1e-5)


def test_crops_are_held_back_from_the_calibration() -> None:
    plain = onnx.load_model_from_string(export("resnet18"))
    crops = np.zeros((400, 64, 32, 3), np.uint8)
    crops[:, 0, 0, 0], crops[:, 0, 0, 1] = np.arange(400) % 256, np.arange(400) // 256
    fitting, held_back = (
        part[:, 0, 0, 0] + 256 * part[:, 0, 0, 1].astype(int) for part in int8.split_crops(crops, plain)
    )
    assert (len(fitting), len(held_back)) == (int8.MAX_CALIBRATED, int8.MAX_HELD_BACK)
    assert not set(fitting) & set(held_back)
    for part in (fitting, held_back):  # evenly over all, in order
        assert part[0] < 8 and part[-1] > 390 and (np.diff(part) > 0).all()
    assert [len(part) for part in int8.split_crops(crops[:16], plain)] == [12, 4]


def test_invalid_crops_are_rejected_with_advice() -> None:
    with pytest.raises(BundleError, match=r"at least 16 crops .* found 15: give more"):
        int8.calibrate(export("resnet18"), draw_crops()[:15])
    with pytest.raises(BundleError, match=r"needs uint8 crops \(N, 64, 32, 3\), found uint8 \(20, 32, 32, 3\)"):
        int8.calibrate(export("resnet18"), draw_crops()[:20, :32])
    with pytest.raises(BundleError, match=r"unknown block 'layer9.9' .* choose among conv1, layer1.0"):
        int8.quantize_graph(calibrated("resnet18"), keep=["layer9.9"])


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"mean_cosine": 0.99}, ""),
        ({"mean_cosine": 0.98, "map_before": 0.5, "map_after": 0.49, "speedup": 1.0}, ""),
        ({"mean_cosine": 0.9799}, "mean cosine to fp32 0.9799 on crops not calibrated on, under 0.98"),
        ({"mean_cosine": float("nan")}, "mean cosine to fp32 nan on crops not calibrated on, under 0.98"),
        (
            {"mean_cosine": 0.99, "map_before": 0.5, "map_after": 0.48},
            "mAP 48.0 against 50.0 of fp32: 2.0 lost, more than 1",
        ),
        ({"mean_cosine": 0.99, "map_before": 0.5, "map_after": 0.52}, ""),
        ({"mean_cosine": 0.99, "map_before": None, "map_after": 0.1}, ""),
        ({"mean_cosine": 0.99, "speedup": 0.68}, "0.68 of the speed of fp32 on this machine, under 1"),
        ({"mean_cosine": 0.99, "speedup": None}, ""),
    ],
)
def test_rejection_reasons_contain_numbers(figures: dict[str, float], reason: str) -> None:
    assert check_int8(Int8Criteria(), **figures) == reason


def test_the_librarys_log_messages_are_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        int8.quantize_graph(calibrated("osnet_x0_25"))
        logging.getLogger("resight").info("and our messages are logged again")
    assert [record.name for record in caplog.records] == ["resight"]
