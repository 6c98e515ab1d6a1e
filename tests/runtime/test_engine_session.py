import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import references_tensorrt
from serving import DIM, SPEC, embed_by_hand, graph

from resight.errors import BundleError, LimitError, ModelError, StartupError
from resight.image import ImageSpec
from resight.runtime.engine import ShapeProfile, build_engine, check_cuda, engine_key
from resight.runtime.tensorrt import EngineSession


@pytest.fixture
def machine(monkeypatch):
    return references_tensorrt.install(monkeypatch)


def plan_of(profile: ShapeProfile) -> bytes:
    return build_engine(graph(0), engine_key(graph(0), precision="fp32", image=SPEC, profile=profile))[0]


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SPEC.height, SPEC.width, 3), dtype=np.uint8)


def test_batches_run_by_the_documented_calls_in_order(machine):
    session = EngineSession(plan_of(ShapeProfile(1, 8, 16)), SPEC)
    assert (session.profile, session.feature_dim) == (ShapeProfile(1, 8, 16), DIM)
    for count in (16, 1, 7):  # a small batch after a large one: none of it may remain
        machine.calls.clear()
        assert np.abs(session.run(pixels(count)) - embed_by_hand(pixels(count))).max() < 1e-5
        assert machine.calls == ["copy host to device", "execute_async_v3", "copy device to host", "synchronize"]
        assert machine.details["batch"] == count


def test_a_batch_below_the_profile_is_padded(machine):
    session = EngineSession(plan_of(ShapeProfile(4, 8, 16)), SPEC)
    assert np.abs(session.run(pixels(3)) - embed_by_hand(pixels(3))).max() < 1e-5
    assert machine.details["batch"] == 4


@pytest.mark.parametrize(
    "images",
    [
        pixels(17),
        pixels(0),
        pixels(2)[:, :-1],
        pixels(2).astype(np.float32),
    ],
    ids=["many", "none", "small", "float"],
)
def test_batches_outside_the_profile_never_reach_the_gpu(machine, images):
    session = EngineSession(plan_of(ShapeProfile(1, 8, 16)), SPEC)
    machine.calls.clear()
    with pytest.raises(LimitError, match=r"expected uint8 of 1\.\.16"):
        session.run(images)
    assert machine.calls == []


def test_features_are_copies(machine):
    session = EngineSession(plan_of(ShapeProfile(1, 8, 16)), SPEC)
    first = session.run(pixels(4))
    kept = first.copy()
    session.run(pixels(5))
    assert np.array_equal(first, kept)


def test_threads_are_serialised_and_use_the_right_gpu(machine):
    session = EngineSession(plan_of(ShapeProfile(1, 8, 16)), SPEC, device_id=1)
    assert machine.current[threading.get_ident()] == 1
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda count: session.run(pixels(count)), [1, 5, 9, 13] * 8))
    for features, count in zip(found, [1, 5, 9, 13] * 8, strict=True):
        assert np.abs(features - embed_by_hand(pixels(count))).max() < 1e-5
    assert len(machine.current) > 1 and set(machine.current.values()) == {1}


def test_memory_is_freed_with_the_session_or_on_close(machine):
    for number in range(5):
        session = EngineSession(plan_of(ShapeProfile(1, 8, 16)), SPEC)
        assert len(machine.memory) == 4 and len(machine.streams) == 1
        if number % 2:
            session.close()
            with pytest.raises(ModelError, match="closed"):
                session.run(pixels(1))
        del session
        gc.collect()
        assert machine.memory == {} and machine.streams == {}


def test_an_engine_of_another_version_is_rejected(machine):
    plan = plan_of(ShapeProfile(1, 8, 16))
    machine.version = "11.5.0"
    with pytest.raises(BundleError, match="another version or GPU"):
        EngineSession(plan, SPEC)


def test_an_engine_of_another_shape_is_rejected(machine):
    with pytest.raises(BundleError, match="expected an engine with tensors"):
        EngineSession(plan_of(ShapeProfile(1, 8, 16)), ImageSpec(height=32, width=32))
    assert machine.memory == {}


def test_a_gpu_failure_is_a_model_error(machine, monkeypatch):
    session = EngineSession(plan_of(ShapeProfile(1, 8, 16)), SPEC)
    monkeypatch.setattr(session._context, "execute_async_v3", lambda stream_handle: False)
    with pytest.raises(ModelError, match="failed on a batch of 2"):
        session.run(pixels(2))
    error = session._cudart.cudaError_t.cudaErrorInvalidValue
    monkeypatch.setattr(session._cudart, "cudaMemcpyAsync", lambda *_: (error,))
    with pytest.raises(ModelError, match="cudaErrorInvalidValue"):
        session.run(pixels(2))


def test_the_fake_runtime_has_only_names_of_the_real_one():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    made = references_tensorrt.cudart_module(references_tensorrt.Machine())
    for name in (name for name in vars(made) if name.startswith("cuda")):
        assert hasattr(real, name), name
    for name in ("cudaError_t", "cudaMemcpyKind"):
        assert all(getattr(getattr(real, name), member.name) == member.value for member in getattr(made, name))
    assert {"name", "major", "minor"} <= set(dir(real.cudaDeviceProp())) and int(real.cudaStream_t(5)) == 5


def test_the_real_runtime_returns_the_expected_types():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    assert isinstance(check_cuda(real.cudaDriverGetVersion()), int)  # works without a driver: 0
    with pytest.raises(StartupError, match=r"cudaError\w+ \(.+\).*nvidia-smi"):
        check_cuda(real.cudaSetDevice(4096))
