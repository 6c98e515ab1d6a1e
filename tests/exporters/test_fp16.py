"""Every backbone equals torch at any batch size in fp32, and in fp16 within its precision."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from exports import CONFIGS, SPEC, cosines, draw_crops, export, in_batches, make_encoder
from onnx import TensorProto

from resight.encoder.model import Encoder, EncoderConfig
from resight.exporters.fp16 import to_fp16
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.exporters.verify import run_onnx, run_torch

pytestmark = pytest.mark.long

# Random weights of such depth magnify any rounding: fp16 and INT8 are tested on the other backbones.
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("osnet_x1_0", "resnet50")]
BACKBONES = ["osnet_x0_25", "resnet18", *LARGE]


@pytest.mark.parametrize("name", BACKBONES)
def test_fp32_equals_torch_at_batch_1_7_and_64(name: str) -> None:
    crops = draw_crops()[:64]
    expected = in_batches(run_torch(make_encoder(name)), crops, 16)
    run = run_onnx(export(name))
    for batch in (1, 7, 64):
        assert cosines(in_batches(run, crops, batch), expected).min() >= 0.9999, batch
    assert (expected @ expected.T).min() < 0.9  # features of different crops differ, so the cosine above is meaningful


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_fp16_equals_torch_within_its_precision(name: str) -> None:
    crops = draw_crops()[:64]
    expected = in_batches(run_torch(make_encoder(name)), crops, 16)
    found = in_batches(run_onnx(to_fp16(export(name))), crops, 7)
    assert found.dtype == np.float32
    assert cosines(found, expected).min() >= 0.999
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1), 1.0, atol=1e-5
    )  # relative to fp32; fp16 has a precision of 5e-4


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_only_the_trunk_is_in_half_precision(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = to_fp16(export(name))
    assert not caplog.records and data == to_fp16(export(name))
    model = onnx.load_model_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    of, operators = types(model), Counter(node.op_type for node in model.graph.node)
    assert (of["images"], of["features"]) == (TensorProto.UINT8, TensorProto.FLOAT)
    for node in model.graph.node:
        if node.op_type in ("Conv", "MaxPool", "AveragePool", "Sigmoid", "Mul"):
            assert {of[tensor] for tensor in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Sub", "Pow", "Clip", "ReduceL2", "Div", "BatchNormalization", "Gemm"):
            assert TensorProto.FLOAT16 not in {of[tensor] for tensor in (*node.input, *node.output)}, node.name
    assert operators["Cast"] == 3  # bytes to fp32, into the trunk, out of it: no other casts
    assert len(data) < (0.8 if name.startswith("osnet") else 0.51) * len(
        export(name)
    )  # half of a small graph are names


def test_stripes_keep_their_shares() -> None:
    config = EncoderConfig("resnet18", "gem", 32, SPEC, parts=4, part_dim=16, local_share=0.5)
    encoder = Encoder(config).eval()
    crops = draw_crops()[:8]
    found = run_onnx(to_fp16(to_onnx(ServingGraph(encoder), SPEC)))(crops)
    assert cosines(found, run_torch(encoder)(crops)).min() >= 0.999


def test_powers_beyond_fp16_are_computed_in_fp32() -> None:
    encoder = Encoder(CONFIGS["resnet18"]).eval()
    encoder.load_state_dict(make_encoder("resnet18").state_dict())
    encoder.heads["global"].pool.p.data.fill_(9.0)  # 4 to the power of 9 exceeds fp16's maximum
    crops = draw_crops()[:8]
    found = run_onnx(to_fp16(to_onnx(ServingGraph(encoder), SPEC)))(crops)
    expected = run_torch(encoder)(crops)
    assert encoder.backbone(encoder.normalise(torch.from_numpy(crops))).max() ** 9 > 65504
    assert cosines(found, expected).min() >= 0.999
