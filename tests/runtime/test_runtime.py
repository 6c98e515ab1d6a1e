import dataclasses
import warnings

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from serving import DIM, SPEC, embed_by_hand, graph, make_bundle

from resight.bundle.bundle import Graph, write_bundle
from resight.bundle.manifest import space_id
from resight.bundle.probes import Parity, make_probes
from resight.errors import BundleError, StartupError
from resight.image import ImageSpec
from resight.runtime import onnx
from resight.runtime.base import DummyRuntime, warm_up
from resight.runtime.onnx import PROVIDERS, OnnxRuntime, cuda_options, tensorrt_options
from resight.runtime.providers import open_runtime


def pixels(count: int, spec: ImageSpec = SPEC) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, spec.height, spec.width, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 7, 32])
def test_a_bundle_computes_the_expected_features_at_any_batch_size(bundle, count):
    runtime = OnnxRuntime(bundle)
    found = runtime.embed(pixels(count))
    assert found.dtype == np.float32 and found.shape == (count, DIM)
    assert np.abs(found - embed_by_hand(pixels(count))).max() < 1e-5
    assert (runtime.space_id, runtime.feature_dim, runtime.image) == (bundle.manifest.space_id, DIM, SPEC)
    assert runtime.provider == "cpu-fp32"


def test_a_bundle_with_the_probes_of_another_model_is_rejected(tmp_path):
    with pytest.raises(BundleError, match="other features than the exported model"):
        OnnxRuntime(make_bundle(tmp_path / "b", probes_of=3))


def test_a_missing_precision_is_rejected(bundle):
    with pytest.raises(BundleError, match="int8"):
        OnnxRuntime(bundle, precision="int8")


@pytest.mark.parametrize("provider", ["cuda", "ort-tensorrt"])
def test_a_missing_provider_is_rejected_without_fallback(bundle, provider, tmp_path):
    if PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has {PROVIDERS[provider]}: nothing is missing")
    with pytest.raises(StartupError, match=rf"{PROVIDERS[provider]}.*--provider cpu"):
        open_runtime(bundle, provider=provider, engine_cache=tmp_path / "engines")


@pytest.mark.parametrize("provider", ["cuda", "ort-tensorrt"])
def test_a_provider_that_does_not_start_is_rejected_without_fallback(bundle, provider, tmp_path, monkeypatch):
    """Its library is listed but does not load: onnxruntime itself would fall back to the CPU with a printed line."""
    if PROVIDERS[provider] in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has {PROVIDERS[provider]}: it may well start")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: list(PROVIDERS.values()))
    with (
        pytest.raises(StartupError, match=rf"provider {provider} could not be started.*CPUExecutionProvider"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # onnxruntime's own warning about the provider
        open_runtime(bundle, provider=provider, engine_cache=tmp_path / "engines")


@pytest.mark.gpu
def test_the_gpu_computes_the_same_features_as_the_cpu(bundle):
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider: install onnxruntime-gpu")
    assert np.abs(open_runtime(bundle, provider="cuda").embed(pixels(7)) - embed_by_hand(pixels(7))).max() < 1e-3


def test_fp32_does_not_use_tf32():
    assert [cuda_options(precision=p, device_id=1)["use_tf32"] for p in ("fp32", "fp16", "int8")] == ["0", "1", "1"]


def test_the_engines_of_onnxruntime_have_explicit_shapes_and_a_private_folder(tmp_path):
    options = tensorrt_options(tmp_path, ("a:1", "a:8", "a:16"), precision="fp16", device_id=2)
    assert options["trt_profile_min_shapes"] == "a:1" and options["trt_profile_max_shapes"] == "a:16"
    assert options["trt_profile_opt_shapes"] == "a:8" and options["device_id"] == "2"
    assert {options["trt_engine_cache_path"], options["trt_timing_cache_path"]} == {str(tmp_path)}
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("True", "False")


@pytest.mark.parametrize(("every", "sizes"), [(True, [32, 16, 8, 4, 2, 1]), (False, [32])])
def test_warm_up_starts_with_the_largest_batch(every, sizes):
    met = []

    class Counting(DummyRuntime):
        def embed(self, images):
            met.append(len(images))
            return super().embed(images)

    warm_up(Counting(), every_size=every)
    assert met == sizes


def bundle_of(path, data: bytes):
    return write_bundle(
        path,
        name="odd",
        space_id=space_id(b"odd", SPEC, DIM),
        image=SPEC,
        graphs=[Graph(data, Parity(0.0, 1.0))],
        probes=make_probes(SPEC, embed_by_hand, count=2),
        weights_licence="none",
        training={},
    )


def test_bytes_that_are_not_a_graph_are_rejected(tmp_path):
    with pytest.raises(BundleError, match=r"model\.onnx was rejected before it was run"):
        OnnxRuntime(bundle_of(tmp_path / "b", graph(0)[:200]))


def test_a_graph_that_onnxruntime_cannot_load_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "check_graph", lambda *_, **__: None)
    with pytest.raises(BundleError, match=r"onnxruntime [\d.]+ cannot load model\.onnx on cpu"):
        OnnxRuntime(bundle_of(tmp_path / "b", graph(0)[:200]))


def test_a_graph_of_another_shape_is_rejected(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 64, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 64, 32])
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with pytest.raises(BundleError, match="rejected before it was run: expected one input images"):
        OnnxRuntime(bundle_of(tmp_path / "b", model.SerializeToString()))


def test_the_dummy_computes_the_features_of_its_docstring():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:2, :2] = (255, 0, 0)
    (found,) = DummyRuntime(dataclasses.replace(SPEC, height=16, width=16)).embed(image.repeat(2, 0).repeat(2, 1)[None])
    expected = np.full((16, 3), -127.5)
    expected[0, 0] = 127.5
    assert np.allclose(found, (expected / np.linalg.norm(expected)).reshape(-1))
