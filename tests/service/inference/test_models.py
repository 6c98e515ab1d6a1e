"""Models of a real server: loading, activation, unloading, restart."""

import asyncio
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from serving import ServerProcess, features_by_hand, jpeg, make_bundle

from resight.bundle.bundle import open_bundle, sign_bundle
from resight.bundle.signing import generate_key, load_private_key
from resight.client import Client, NewEntry
from resight.errors import (
    BundleError,
    ConflictError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    SpaceMismatchError,
)
from resight.service.inference.embedder import Embedder
from resight.service.inference.models import ModelHost, ModelRoot
from resight.service.settings import Settings

pytestmark = pytest.mark.long


@pytest.fixture
def root(tmp_path):
    """A model folder: a, b, and one that fails its probes."""
    for seed, name in enumerate(("a", "b")):
        make_bundle(tmp_path / "models" / name, seed=seed)
    make_bundle(tmp_path / "models" / "bad", seed=2, probes_of=7)
    return tmp_path / "models"


@pytest.fixture
def serving(root, tmp_path):
    server = ServerProcess(root / "a", tmp_path / "data", RESIGHT_MODELS=str(root))
    with Client(server.wait_ready()) as client:
        yield client
    assert server.end() == 0, server.log.read_text()


def load_model(client: Client, model_id: str):
    done = client.wait(client.load_model(model_id), timeout_s=60)
    if done.error is not None:
        raise done.error
    return done


def by_model(client: Client, crop: bytes, model_id: str) -> np.ndarray:
    return client.embed(crop, model=model_id)


def test_a_model_is_loaded_activated_and_deactivated(serving):
    assert [(one.model_id, one.state, one.active) for one in serving.models()] == [
        ("a", "ready", True), ("b", "available", False), ("bad", "available", False),
    ]  # fmt: skip
    crop = jpeg(1)
    with pytest.raises(ModelNotFoundError, match="load it first"):
        by_model(serving, crop, "b")
    done = load_model(serving, "b")
    assert done.state == "succeeded" and done.kind == "load_model" and done.result["model_id"] == "b"
    assert [one.operation_id for one in serving.operations()] == [done.operation_id]
    for model_id, seed in (("", 0), ("a", 0), ("b", 1)):
        assert np.allclose(by_model(serving, crop, model_id), features_by_hand([crop], seed)[0], atol=1e-5)
    info = serving.model("b")
    assert info.min_cosine > 0.9999 and info.provider == "cpu-fp32" and len(info.sha256) == 64
    with pytest.raises(ConflictError):
        serving.activate_model("b", expected="bad")
    active, previous = serving.activate_model("b", expected="a")
    assert (active.model_id, active.active, previous.model_id, previous.active) == ("b", True, "a", False)
    assert np.allclose(serving.embed(crop), features_by_hand([crop], 1)[0], atol=1e-5)
    assert serving.info().space_id == info.space_id
    serving.activate_model("a", expected="b")
    assert np.allclose(serving.embed(crop), features_by_hand([crop], 0)[0], atol=1e-5)
    with pytest.raises(ModelInUseError, match="active"):
        serving.unload_model("a")
    serving.unload_model("b")
    assert serving.model("b").state == "available"
    with pytest.raises(ModelNotFoundError):
        serving.activate_model("b")


def test_a_failed_load_changes_nothing_and_is_reported(serving, root):
    crop = jpeg(1)
    for _ in range(2):
        with pytest.raises(BundleError, match="other features") as raised:
            load_model(serving, "bad")
        assert str(root) not in str(raised.value)
        assert np.allclose(serving.embed(crop), features_by_hand([crop])[0], atol=1e-5)
    info = serving.model("bad")
    assert info.state == "failed" and "other features" in info.problem
    load_model(serving, "b")
    data = bytearray((root / "b" / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    shutil.copytree(root / "b", root / "kept")
    shutil.rmtree(root / "b")
    make_bundle(root / "b", seed=5)  # a newer bundle of the same name, damaged
    (root / "b" / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        load_model(serving, "b")
    assert serving.model("b").problem and serving.model("b").state == "ready"
    assert np.allclose(by_model(serving, crop, "b"), features_by_hand([crop], 1)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["../a", "/etc", "A", "", "a/b", "x" * 64, "nothing", "link", "http://example.org/a"])
def test_a_model_name_cannot_leave_the_folder(root, name):
    (root / "link").symlink_to(root / "a")
    with pytest.raises(ModelNotFoundError):
        ModelRoot(root).find(name)
    assert ModelRoot(root).names() == ["a", "b", "bad"]


def test_loaded_models_survive_a_restart_unless_the_bundle_changes(root, tmp_path):
    data, crop = tmp_path / "data", jpeg(3)
    first = ServerProcess(root / "a", data, RESIGHT_MODELS=str(root))
    with Client(first.wait_ready()) as client:
        load_model(client, "b")
        client.activate_model("b")
    assert first.end(9) == -9
    second = ServerProcess(root / "a", data, RESIGHT_MODELS=str(root))
    with Client(second.wait_ready()) as client:
        assert [(one.model_id, one.active) for one in client.models() if one.state == "ready"] == [
            ("a", False), ("b", True),
        ]  # fmt: skip
        assert np.allclose(client.embed(crop), features_by_hand([crop], 1)[0], atol=1e-5)
    assert second.end() == 0
    make_bundle(root / "c", seed=3)
    third = ServerProcess(root / "c", data, RESIGHT_MODELS=str(root))
    with Client(third.wait_ready()) as client:
        assert client.info().model == "tiny-3" and client.model("b").state == "ready"
        client.activate_model("b")
    assert third.end() == 0
    shutil.rmtree(root / "b")
    fourth = ServerProcess(root / "c", data, RESIGHT_MODELS=str(root))
    assert fourth.process.wait(60) != 0
    assert "models.json" in "".join(fourth.log.read_text().replace("│", "").split())


def test_with_trusted_keys_only_signed_models_are_loaded(root, tmp_path):
    generate_key(tmp_path / "key")
    key = load_private_key(tmp_path / "key")
    sign_bundle(root / "a", key)
    env = {"RESIGHT_MODELS": str(root), "RESIGHT_TRUSTED_KEYS": json.dumps([key.public])}
    server = ServerProcess(root / "a", tmp_path / "data", **env)
    with Client(server.wait_ready()) as client:
        with pytest.raises(BundleError, match="not signed"):
            load_model(client, "b")
        sign_bundle(root / "b", key)
        load_model(client, "b")
    assert server.end() == 0
    unsigned = ServerProcess(root / "bad", tmp_path / "other", "--trusted-key", key.public)
    assert unsigned.process.wait(60) != 0 and "not signed" in " ".join(unsigned.log.read_text().split())


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
def test_fifty_swaps_under_load_fail_no_call_and_leak_no_memory(root, tmp_path):
    server = ServerProcess(root / "a", tmp_path / "data", RESIGHT_MODELS=str(root))
    crops = [jpeg(n) for n in range(8)]
    expected = [features_by_hand(crops, seed) for seed in (0, 1)]
    done, wrong = threading.Event(), []
    calls = [0]

    def load():
        with Client(address) as own:
            while not done.is_set():
                outcomes = np.stack(own.embed_batch(crops))
                calls[0] += 1
                if not any(np.allclose(outcomes, good, atol=1e-5) for good in expected):  # each call uses one model
                    wrong.append(outcomes)

    address = server.wait_ready()
    with Client(address) as client:
        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        sizes = []
        for swap in range(50):
            old, new = ("a", "b")[swap % 2], ("b", "a")[swap % 2]
            load_model(client, new)
            client.activate_model(new, expected=old)
            client.unload_model(old)
            sizes.append(resident_kib(server.process.pid))
        done.set()
        for thread in threads:
            thread.join()
    assert server.end() == 0
    assert not wrong and calls[0] > 20
    assert server.log.read_text().count("freed model=") == 50
    assert np.mean(sizes[-10:]) < np.mean(sizes[5:15]) + 8 * 1024  # a leaked session of this tiny model takes 1 MiB


def test_a_model_is_freed_after_the_last_request_that_uses_it(root, tmp_path):
    async def body():
        settings = Settings(bundle=root / "a", models=root, data=tmp_path)
        embedder = Embedder(settings)
        embedder.start()
        host = ModelHost(embedder, settings, tmp_path)
        await host.start()
        loading = asyncio.create_task(host.load("b"))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotReadyError), host.lease("b"):
            pass
        await loading
        with host.lease() as old:
            await host.activate("b")
            unloaded = await host.unload("a")
            assert unloaded is old and not old.freed
            with pytest.raises(ModelNotFoundError), host.lease("a"):
                pass
            with pytest.raises(SpaceMismatchError, match="load it too"), host.lease_space(old.space, collection="c"):
                pass
            (made,) = await old.embed([jpeg(1)], time.monotonic() + 60)
            assert np.allclose(made.feature, features_by_hand([jpeg(1)])[0], atol=1e-5)
        assert old.freed
        await host.load("a")
        with host.lease("a", pin=True), pytest.raises(ModelInUseError, match="migration"):
            await host.unload("a")
        await embedder.stop()

    asyncio.run(body())


def test_the_active_model_cannot_be_replaced_by_one_of_another_space(root, tmp_path, serving):
    shutil.rmtree(root / "a")
    make_bundle(root / "a", seed=9)
    with pytest.raises(ModelInUseError, match="another name"):
        load_model(serving, "a")
    crop = jpeg(1)
    assert np.allclose(serving.embed(crop), features_by_hand([crop])[0], atol=1e-5)
    assert open_bundle(root / "a").manifest.name == "tiny-9"


def test_without_a_model_folder_there_is_only_the_bundle(client):
    assert [one.model_id for one in client.models()] == ["tiny-0"]
    with pytest.raises(ModelNotFoundError, match="--models"):
        client.load_model("other")
    client.create_collection("without-models", unlimited_retention=True)
    client.enrol("without-models", NewEntry(jpeg(1)))
    client.delete_collection("without-models", force=True)
