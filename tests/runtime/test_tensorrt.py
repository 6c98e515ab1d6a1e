import logging

import numpy as np
import pytest
import references_forms
import references_tensorrt
from serving import DIM, SPEC, embed_by_hand, make_bundle

from resight.bundle.bundle import open_bundle
from resight.errors import BundleError, StartupError
from resight.runtime import tensorrt
from resight.runtime.engine import ShapeProfile, engine_key
from resight.runtime.providers import open_runtime
from resight.runtime.tensorrt import TensorRTRuntime


@pytest.fixture
def machine(monkeypatch):
    return references_tensorrt.install(monkeypatch)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return references_forms.make_forms(tmp_path_factory.mktemp("forms") / "b")


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SPEC.height, SPEC.width, 3), dtype=np.uint8)


def test_a_built_engine_computes_the_expected_features(machine, bundle, tmp_path):
    runtime = open_runtime(bundle, provider="tensorrt", max_batch=16, engine_cache=tmp_path / "engines")
    assert isinstance(runtime, TensorRTRuntime)
    assert (runtime.provider, runtime.max_batch, runtime.image) == ("tensorrt-fp32", 16, SPEC)
    assert (runtime.name, runtime.space_id, runtime.feature_dim) == ("tiny-0", bundle.manifest.space_id, DIM)
    for count in (1, 7, 16):
        found = runtime.embed(pixels(count))
        assert found.dtype == np.float32 and found.shape == (count, DIM)
        assert np.abs(found - embed_by_hand(pixels(count))).max() < 1e-5


def test_the_second_start_loads_the_engine_from_the_cache(machine, bundle, tmp_path):
    TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    machine.calls.clear()
    TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    assert "build_serialized_network" not in machine.calls and "deserialize_cuda_engine" in machine.calls


@pytest.mark.parametrize("harm", ["altered", "cut", "copied", "opened"])
def test_an_engine_with_a_wrong_seal_is_rebuilt_with_a_warning(machine, bundle, tmp_path, harm, caplog):
    TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    [plan] = (tmp_path / "engines").glob("*.plan")
    data = plan.read_bytes()
    if harm == "copied":
        TensorRTRuntime(bundle, engine_cache=tmp_path / "elsewhere")
        [other] = (tmp_path / "elsewhere").glob("*.plan")
        assert other.name == plan.name
        plan.write_bytes(other.read_bytes())
    elif harm == "opened":
        plan.chmod(0o666)
    else:
        plan.write_bytes(data[:-1] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    machine.calls.clear()
    caplog.clear()
    runtime = TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    assert "build_serialized_network" in machine.calls and "does not match its seal" in caplog.text
    assert plan.read_bytes() == data
    assert np.abs(runtime.embed(pixels(3)) - embed_by_hand(pixels(3))).max() < 1e-5


def test_an_engine_that_tensorrt_rejects_is_rebuilt_once(machine, bundle, tmp_path, monkeypatch, caplog):
    key = engine_key(bundle.read(), precision="fp32", image=SPEC, profile=ShapeProfile(1, 32, 32))
    TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    monkeypatch.setattr(tensorrt, "engine_key", lambda *_, **__: key)
    machine.gpu += " of another stepping"  # which is not part of the key
    machine.calls.clear()
    runtime = TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    assert machine.calls.count("build_serialized_network") == 1 and "another version or GPU" in caplog.text
    assert np.abs(runtime.embed(pixels(3)) - embed_by_hand(pixels(3))).max() < 1e-5


@pytest.mark.parametrize("max_batch", [1, 4, 32, 33])
def test_the_engine_accepts_batches_of_the_batcher_and_the_probes(machine, bundle, tmp_path, max_batch):
    runtime = TensorRTRuntime(bundle, max_batch=max_batch, engine_cache=tmp_path / "engines")
    least, tuned, most = machine.details["profile"]["images"]
    assert (least[0], tuned[0], most[0]) == (1, max_batch, max(max_batch, 7))
    assert runtime.embed(pixels(max_batch)).shape == (max_batch, DIM)


def test_each_precision_has_its_own_graph_and_engine(machine, forms, tmp_path):
    for precision in ("fp32", "fp16", "int8"):
        runtime = TensorRTRuntime(forms, precision=precision, engine_cache=tmp_path / "engines")
        cosine = (runtime.embed(pixels(7)) * embed_by_hand(pixels(7))).sum(1)
        assert runtime.provider == f"tensorrt-{precision}" and cosine.min() > 0.999
    assert len(list((tmp_path / "engines").glob("*.plan"))) == 3
    assert machine.calls.count("parse") == 3


def test_a_precision_not_exported_for_tensorrt_is_rejected(machine, bundle, tmp_path):
    with pytest.raises(BundleError, match="no int8 tensorrt graph"):
        TensorRTRuntime(bundle, precision="int8", engine_cache=tmp_path / "engines")


def test_an_engine_that_fails_the_probes_is_rejected(machine, tmp_path):
    with pytest.raises(BundleError, match=r"TensorRT engine of model\.onnx gives other features"):
        TensorRTRuntime(make_bundle(tmp_path / "b", probes_of=3), engine_cache=tmp_path / "engines")


def test_a_graph_changed_after_the_bundle_was_opened_never_reaches_tensorrt(machine, tmp_path):
    bundle = open_bundle(make_bundle(tmp_path / "b").path)
    data = bytearray(bundle.artefact().read_bytes())
    data[40] ^= 1
    bundle.artefact().write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx.*not the file that was exported"):
        TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    assert machine.calls == []


def test_swapping_models_does_not_leak_memory(machine, bundle, tmp_path):
    for _ in range(20):
        TensorRTRuntime(bundle, engine_cache=tmp_path / "engines").close()
    assert machine.memory == {} and machine.streams == {}


def test_without_tensorrt_the_error_names_the_missing_package(bundle, tmp_path):
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(StartupError, match=r"package tensorrt.*resight\[gpu\].*--provider cpu"):
            open_runtime(bundle, provider="tensorrt", engine_cache=tmp_path / "engines")
        assert not (tmp_path / "engines").exists()
    else:
        pytest.skip("tensorrt is installed: nothing is missing")


def test_the_log_reports_the_probes(machine, bundle, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    TensorRTRuntime(bundle, engine_cache=tmp_path / "engines")
    assert "probes passed bundle=tiny-0 provider=tensorrt-fp32 min_cosine=1.0" in caplog.text


@pytest.mark.gpu
def test_the_fake_tensorrt_has_only_names_of_the_real_one():
    real = pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    made = references_tensorrt.tensorrt_module(references_tensorrt.Machine(version=real.__version__))
    for name in ("BuilderFlag", "MemoryPoolType", "NetworkDefinitionCreationFlag", "TensorIOMode"):
        for member in getattr(made, name):
            assert hasattr(getattr(real, name), member.name), (name, member.name)
    for name in ("Builder", "OnnxParser", "Runtime"):
        own = {method for method in vars(getattr(made, name)) if not method.startswith("_")}
        assert own <= set(dir(getattr(real, name))), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_real_engine_computes_the_expected_features(forms, tmp_path, precision):
    pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    runtime = TensorRTRuntime(forms, precision=precision, max_batch=16, engine_cache=tmp_path / "engines")
    for count in (1, 7, 16):
        assert (runtime.embed(pixels(count)) * embed_by_hand(pixels(count))).sum(1).min() > 0.999
    again = TensorRTRuntime(forms, precision=precision, max_batch=16, engine_cache=tmp_path / "engines")
    assert np.array_equal(again.embed(pixels(7)), runtime.embed(pixels(7)))
