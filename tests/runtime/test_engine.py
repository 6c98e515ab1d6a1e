import dataclasses
import logging

import onnx
import pytest
import references_tensorrt
from onnx import helper
from serving import SPEC, graph

from resight.errors import BundleError, StartupError
from resight.runtime import engine
from resight.runtime.engine import EngineCache, EngineKey, ShapeProfile, build_engine, engine_key, load_or_build_engine

PROFILE = ShapeProfile(1, 8, 16)


@pytest.fixture
def machine(monkeypatch):
    return references_tensorrt.install(monkeypatch)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def key(data: bytes = b"", precision: str = "fp32") -> EngineKey:
    return engine_key(data, precision=precision, image=SPEC, profile=PROFILE)


def bytes_transposed() -> bytes:
    """A graph that transposes bytes before the cast, which a CPU accepts and TensorRT rejects."""
    model = onnx.load_from_string(graph(0))
    model.graph.node[0].input[0] = "moved"
    model.graph.node.insert(0, helper.make_node("Transpose", ["images"], ["moved"], perm=[0, 1, 2, 3]))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def test_an_engine_is_built_by_the_documented_calls(machine):
    plan, timings = build_engine(graph(0), key())
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
    assert list(machine.details["limits"].values()) == [engine.WORKSPACE_BYTES]
    assert machine.details["network_flags"] == 0 and not machine.details["builder_flags"]
    assert plan and timings.endswith(b"one more;")


def test_tensorrt_10_is_configured_for_strong_types(monkeypatch):
    machine = references_tensorrt.install(monkeypatch, version="10.14.1")
    build_engine(graph(0), key())
    assert machine.details["network_flags"] == 1 << 1  # STRONGLY_TYPED is 1 there, EXPLICIT_BATCH 0


def test_only_fp32_disables_tf32(machine):
    for precision, allowed in (("fp32", False), ("fp16", True), ("int8", True)):
        build_engine(graph(0), key(precision=precision))
        assert ("TF32" in {flag.name for flag in machine.details["builder_flags"]}) is allowed


def test_a_graph_that_tensorrt_rejects_is_reported(machine):
    with pytest.raises(BundleError, match=r"does not accept the fp32 graph.*UINT8 inputs must be cast"):
        build_engine(bytes_transposed(), key())
    machine.refuse_build = True
    with pytest.raises(BundleError, match=r"no engine of the fp32 graph on NVIDIA Stand-in.*--provider cuda"):
        build_engine(graph(0), key())


def test_an_engine_is_built_once_and_then_cached(machine, cache, caplog):
    caplog.set_level(logging.INFO)
    plan = load_or_build_engine(graph(0), key(graph(0)), cache)
    assert "takes minutes" in caplog.text and "engine built" in caplog.text
    machine.calls.clear()
    caplog.clear()
    assert load_or_build_engine(graph(0), key(graph(0)), cache) == plan
    assert machine.calls == [] and caplog.text == ""
    assert load_or_build_engine(graph(0), key(graph(0)), cache, rebuild=True) == plan
    assert "build_serialized_network" in machine.calls


def test_the_timing_cache_is_reused_unless_its_seal_is_wrong(machine, cache):
    load_or_build_engine(graph(0), key(graph(0)), cache)
    load_or_build_engine(graph(1), key(graph(1)), cache)
    [timings] = cache.folder.glob("*.timing")
    assert timings.read_bytes().count(b"one more;") == 2
    timings.write_bytes(timings.read_bytes()[:-1])
    load_or_build_engine(graph(2), key(graph(2)), cache)
    assert timings.read_bytes().count(b"one more;") == 1


def test_a_timing_cache_rejected_by_tensorrt_is_replaced(machine):
    _, timings = build_engine(graph(0), key(), b"timings of another GPU")
    assert timings == b"timings of NVIDIA Stand-in;one more;"
    assert machine.calls.count("set_timing_cache") == 2


def test_the_file_name_depends_on_everything_the_engine_depends_on(machine):
    first = key(graph(0))
    assert (first.gpu, first.compute_capability, first.driver) == (references_tensorrt.GPU, "9.0", 13000)
    others = {
        "gpu": "other", "compute_capability": "8.0", "driver": 1, "tensorrt": "11.5", "onnx_sha256": "0",
        "precision": "fp16", "image": (1, 1), "profile": ShapeProfile(1, 8, 17),
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(EngineKey)}
    files = {dataclasses.replace(first, **{name: value}).file for name, value in others.items()}
    assert len(files) == len(others) and first.file not in files


def test_progress_is_logged_while_an_engine_is_built(machine, caplog, monkeypatch):
    monkeypatch.setattr(engine, "PROGRESS_S", 0.0)
    caplog.set_level(logging.INFO)
    build_engine(graph(0), key())
    assert "building: Building 2/2" in caplog.text
    assert "tensorrt: built by a stand-in" in caplog.text and "thousands of lines" not in caplog.text


@pytest.mark.parametrize("wrong", [(0, 1, 1), (2, 1, 3), (1, 4, 3)])
def test_a_profile_is_ordered(wrong):
    with pytest.raises(ValueError, match="least <= tuned <= most"):
        ShapeProfile(*wrong)


def test_missing_packages_are_named(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engine.importlib, "import_module", absent)
    with pytest.raises(StartupError, match=r"package tensorrt.*No module.*install resight\[gpu\]"):
        engine.load_tensorrt()
    with pytest.raises(StartupError, match=r"package cuda-bindings.*--provider cpu"):
        engine.load_cudart()


def test_a_missing_gpu_is_reported(machine):
    with pytest.raises(StartupError, match=r"cudaErrorInvalidDevice \(invalid device ordinal\).*nvidia-smi"):
        engine_key(b"", precision="fp32", image=SPEC, profile=PROFILE, device_id=7)
