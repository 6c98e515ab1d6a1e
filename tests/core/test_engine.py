import dataclasses
import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import references_tensorrt
from onnx import TensorProto, helper, numpy_helper
from serving import DIM, SPEC, embed_by_hand, graph

from resight import engine, engine_build
from resight.engine import EngineKey, Profile, engine_key, find_engine
from resight.engine_build import build, cast_first
from resight.engine_cache import EngineCache
from resight.errors import BundleError, StartupError

PROFILE = Profile(1, 8, 16)


@pytest.fixture
def machine(monkeypatch):
    return references_tensorrt.install(monkeypatch)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def key(data: bytes = b"", precision: str = "fp32") -> EngineKey:
    return engine_key(data, precision=precision, image=SPEC, profile=PROFILE)


def transposed_first() -> bytes:
    """The order of a real export: bytes are moved before they become floats."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["f"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["p"], ["v"]),
        helper.make_node("MatMul", ["v", "w"], ["m"]),
        helper.make_node("ReduceL2", ["m", "axes"], ["n"], keepdims=1),
        helper.make_node("Div", ["m", "n"], ["features"]),
    ]
    weights = np.random.default_rng(0).normal(size=(96, DIM)).astype(np.float32)
    initial = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([1]), "axes")]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SPEC.height, SPEC.width, 3])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", DIM])
    made = helper.make_graph(nodes, "real", [images], [features], initial)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


def run(data: bytes, images: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


def test_the_cast_moves_before_the_transposition_and_nothing_else_changes(machine):
    data = transposed_first()
    moved = cast_first(data)
    onnx.checker.check_model(moved, full_check=True)
    assert [node.op_type for node in onnx.load_from_string(moved).graph.node][:2] == ["Cast", "Transpose"]
    images = np.random.default_rng(1).integers(0, 256, (3, SPEC.height, SPEC.width, 3), dtype=np.uint8)
    assert np.array_equal(run(data, images), run(moved, images))
    assert references_tensorrt.refused(onnx.load_from_string(data), machine, 0)
    assert not references_tensorrt.refused(onnx.load_from_string(moved), machine, 0)
    assert cast_first(moved) == moved and cast_first(graph(0)) == graph(0)


def test_an_engine_is_built_by_the_documented_calls(machine):
    plan, timings = build(transposed_first(), key())
    assert machine.calls == [
        "Builder",
        "create_network",
        "parse",
        "set_timing_cache",
        "add_optimization_profile",
        "build_serialized_network",
    ]
    side = (SPEC.height, SPEC.width, 3)
    assert machine.details["profile"] == {"images": [(1, *side), (8, *side), (16, *side)]}
    assert list(machine.details["limits"].values()) == [engine_build.WORKSPACE_BYTES]
    assert machine.details["network_flags"] == 0 and not machine.details["builder_flags"]
    assert plan and timings.endswith(b"one more;")


def test_tensorrt_10_is_asked_for_strong_types(monkeypatch):
    machine = references_tensorrt.install(monkeypatch, version="10.14.1")
    build(graph(0), key())
    assert machine.details["network_flags"] == 1 << 1  # STRONGLY_TYPED is 1 there, EXPLICIT_BATCH 0


def test_only_fp32_goes_without_tf32(machine):
    for precision, allowed in (("fp32", False), ("fp16", True), ("int8", True)):
        build(graph(0), key(precision=precision))
        assert ("TF32" in {flag.name for flag in machine.details["builder_flags"]}) is allowed


def test_a_graph_that_tensorrt_does_not_take_is_told(machine, monkeypatch):
    monkeypatch.setattr(engine_build, "cast_first", lambda data: data)
    with pytest.raises(BundleError, match=r"does not take the fp32 graph.*UINT8 inputs must be cast"):
        build(transposed_first(), key())
    machine.refuse_build = True
    with pytest.raises(BundleError, match=r"no engine of the fp32 graph on NVIDIA Stand-in.*--provider cuda"):
        build(graph(0), key())


def test_an_engine_is_built_once_and_found_again(machine, cache, caplog):
    caplog.set_level(logging.INFO)
    plan = find_engine(graph(0), key(graph(0)), cache)
    assert "takes minutes" in caplog.text and "engine built" in caplog.text
    machine.calls.clear()
    caplog.clear()
    assert find_engine(graph(0), key(graph(0)), cache) == plan
    assert machine.calls == [] and caplog.text == ""
    assert find_engine(graph(0), key(graph(0)), cache, anew=True) == plan
    assert "build_serialized_network" in machine.calls


def test_timings_are_kept_for_the_next_engine_and_thrown_away_when_not_ours(machine, cache):
    find_engine(graph(0), key(graph(0)), cache)
    find_engine(graph(1), key(graph(1)), cache)
    [timings] = cache.folder.glob("*.timing")
    assert timings.read_bytes().count(b"one more;") == 2
    timings.write_bytes(timings.read_bytes()[:-1])
    find_engine(graph(2), key(graph(2)), cache)
    assert timings.read_bytes().count(b"one more;") == 1


def test_timings_of_another_gpu_are_left_to_tensorrt_to_refuse(machine):
    _, timings = build(graph(0), key(), b"timings of another GPU")
    assert timings == b"timings of NVIDIA Stand-in;one more;"
    assert machine.calls.count("set_timing_cache") == 2


def test_everything_an_engine_depends_on_names_it(machine):
    first = key(graph(0))
    assert (first.gpu, first.compute_capability, first.driver) == (references_tensorrt.GPU, "9.0", 13000)
    others = {
        "gpu": "other", "compute_capability": "8.0", "driver": 1, "tensorrt": "11.5", "onnx_sha256": "0",
        "precision": "fp16", "image": (1, 1), "profile": Profile(1, 8, 17),
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(EngineKey)}
    files = {dataclasses.replace(first, **{name: value}).file for name, value in others.items()}
    assert len(files) == len(others) and first.file not in files


def test_progress_is_told_while_an_engine_is_built(machine, caplog, monkeypatch):
    monkeypatch.setattr(engine_build, "PROGRESS_S", 0.0)
    caplog.set_level(logging.INFO)
    build(graph(0), key())
    assert "building: Building 2/2" in caplog.text
    assert "tensorrt: built by a stand-in" in caplog.text and "thousands of lines" not in caplog.text


@pytest.mark.parametrize("wrong", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_a_profile_is_ordered(wrong):
    with pytest.raises(ValueError, match="least <= tuned <= most"):
        Profile(*wrong)


def test_what_is_missing_is_named(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engine.importlib, "import_module", absent)
    with pytest.raises(StartupError, match=r"package tensorrt.*No module.*install resight\[gpu\]"):
        engine.load_tensorrt()
    with pytest.raises(StartupError, match=r"package cuda-bindings.*--provider cpu"):
        engine.load_cudart()


def test_a_gpu_that_is_not_there_is_told(machine):
    with pytest.raises(StartupError, match=r"cudaErrorInvalidDevice \(invalid device ordinal\).*nvidia-smi"):
        engine_key(b"", precision="fp32", image=SPEC, profile=PROFILE, device_id=7)


def test_the_handmade_graph_means_what_the_others_take_it_for():
    images = np.random.default_rng(1).integers(0, 256, (2, SPEC.height, SPEC.width, 3), dtype=np.uint8)
    assert np.abs(run(graph(0), images) - embed_by_hand(images)).max() < 1e-5
