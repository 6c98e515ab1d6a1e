"""The server process: start, failure to start, restart, kill and drain."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import ServerProcess, jpeg, make_bundle

from resight.client import Client, NewEntry, Query
from resight.errors import OverloadedError, ReIDError, SpaceMismatchError, UnavailableError
from resight.service.access.auth import Role, TokenFile

pytestmark = pytest.mark.long


def startup_error(process: ServerProcess) -> str:
    """The log of a server that fails to start, without the frames that rich draws."""
    assert process.process.wait(60) != 0
    return " ".join(process.log.read_text().replace("│", " ").split())


def test_server_json_has_the_address_while_the_server_runs(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data")
    address = server.wait_ready()
    info = json.loads((tmp_path / "data" / "server.json").read_text())
    assert info["address"] == address and info["pid"] == server.process.pid
    assert f"serving {address} space={info['space_id']}" in server.log.read_text()
    assert server.end() == 0
    assert not (tmp_path / "data" / "server.json").exists()


def test_the_process_never_loads_torch(server):
    with open(f"/proc/{server.process.pid}/maps") as maps:
        mapped = maps.read()
    assert "onnxruntime" in mapped and "torch" not in mapped
    code = (
        "import resight.service.app, resight.cli.server, sys\n"
        "bad = {'torch', 'torchvision', 'onnx', 'sklearn', 'resight.encoder.model'}\n"
        "bad |= {'resight.training', 'resight.exporters'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_port_in_use_is_refused_with_advice(bundle_path, tmp_path, server):
    second = ServerProcess(bundle_path, tmp_path / "data", listen=server.wait_ready())
    text = startup_error(second)
    assert "StartupError" in text and "cannot listen on" in text and "--listen" in text
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        third = ServerProcess(bundle_path, tmp_path / "data", listen=f"127.0.0.1:{other.getsockname()[1]}")
        assert "cannot listen on" in startup_error(third)


def test_a_data_folder_in_use_is_refused_with_the_holders_pid(bundle_path, server):
    text = startup_error(ServerProcess(bundle_path, server.data))
    assert f"is held by process {server.process.pid}" in text
    assert server.wait_ready()  # and the holder's server.json is untouched


def test_an_address_others_can_reach_is_refused_without_authentication_or_encryption(bundle_path, tmp_path):
    text = startup_error(ServerProcess(bundle_path, tmp_path / "data", "--behind-tls-proxy", listen="0.0.0.0:0"))
    assert "StartupError" in text and "resight token create" in text
    assert not (tmp_path / "data").exists()
    TokenFile(tmp_path / "data").create("anna", Role.ADMIN)
    text = startup_error(ServerProcess(bundle_path, tmp_path / "data", listen="0.0.0.0:0"))
    assert "StartupError" in text and "--tls-cert" in text and "--behind-tls-proxy" in text
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tokens.json", "tokens.lock"]


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "probes.npz"])
def test_a_bundle_with_a_flipped_byte_is_refused(tmp_path, file):
    bundle = make_bundle(tmp_path / "bundle")
    data = bytearray((bundle.path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle.path / file).write_bytes(data)
    text = startup_error(ServerProcess(bundle.path, tmp_path / "data"))
    assert "BundleError" in text and file in text


def test_a_bundle_that_fails_its_probes_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", probes_of=7)
    assert "gives other features than the exported model" in startup_error(
        ServerProcess(bundle.path, tmp_path / "data")
    )


def test_a_restart_finds_every_entry(bundle_path, tmp_path):
    first = ServerProcess(bundle_path, tmp_path / "data")
    with Client(first.wait_ready()) as client:
        client.create_collection("kept", unlimited_retention=True)
        client.enrol_batch("kept", [NewEntry(jpeg(p, s), f"{p}-{s}", f"p{p}") for p in range(20) for s in range(5)])
        client.delete_entry("kept", "7-2")
        before = client.search("kept", jpeg(7, 9), top_k=99)
    assert first.end() == 0
    second = ServerProcess(bundle_path, tmp_path / "data")
    with Client(second.wait_ready()) as client:
        after = client.search("kept", jpeg(7, 9), top_k=99)
        assert len(after.hits) == 99 and after.hits == before.hits and after.revision == before.revision
        entry = client.enrol("kept", NewEntry(jpeg(7, 2), "7-2"))
        assert client.search("kept", jpeg(7, 2), top_k=1).hits[0].entry == entry
    assert second.end() == 0


def test_another_model_keeps_the_gallery_and_refuses_to_mix_spaces(bundle_path, tmp_path):
    first = ServerProcess(bundle_path, tmp_path / "data")
    with Client(first.wait_ready()) as client:
        client.create_collection("old", unlimited_retention=True)
        client.enrol("old", NewEntry(jpeg(1), "e"))
        feature = client.get_feature("old", "e")
    assert first.end() == 0
    other = make_bundle(tmp_path / "other", seed=5)
    second = ServerProcess(other.path, tmp_path / "data")
    with Client(second.wait_ready()) as client:
        for call in (lambda: client.search("old", jpeg(1)), lambda: client.enrol("old", NewEntry(jpeg(1)))):
            with pytest.raises(SpaceMismatchError, match="serve that model"):
                call()
        assert client.search("old", feature).hits[0].entry.entry_id == "e"
        client.create_collection("new", unlimited_retention=True)
        client.enrol("new", NewEntry(jpeg(1)))
        assert client.search("new", jpeg(1)).hits[0].similarity > 0.999
    assert second.end() == 0


@pytest.mark.slow
def test_a_kill_during_many_enrolments_loses_nothing_acknowledged(bundle_path, tmp_path):
    acknowledged: dict[str, np.ndarray] = {}
    attempted: set[str] = set()
    rng = random.Random(0)
    for round_ in range(3):
        server = ServerProcess(bundle_path, tmp_path / "data")
        address = server.wait_ready()
        with Client(address) as client:
            if round_ == 0:
                client.create_collection("storm", unlimited_retention=True)
            check(client, acknowledged, attempted)

        def enrol(worker: int, address=address, round_=round_):
            with Client(address, timeout_s=2) as own:
                for number in range(1000):
                    names = [f"{round_}-{worker}-{number}-{n}" for n in range(3)]
                    attempted.update(names)
                    try:
                        outcomes = own.enrol_batch(
                            "storm", [NewEntry(jpeg(number % 50, n), name) for n, name in enumerate(names)]
                        )
                    except ReIDError:
                        return
                    for n, outcome in enumerate(outcomes):
                        if not isinstance(outcome, ReIDError):
                            acknowledged[outcome.entry_id] = jpeg(number % 50, n)

        workers = [threading.Thread(target=enrol, args=(worker,)) for worker in range(3)]
        for worker in workers:
            worker.start()
        before = len(acknowledged)
        while len(acknowledged) < before + 30:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        for worker in workers:
            worker.join(30)
            assert not worker.is_alive()
    server = ServerProcess(bundle_path, tmp_path / "data")
    with Client(server.wait_ready()) as client:
        check(client, acknowledged, attempted)
        assert len(acknowledged) >= 90
        sample = rng.sample(sorted(acknowledged), 60)
        for name, answer in zip(
            sample, client.search_batch("storm", [Query(acknowledged[name], 400) for name in sample]), strict=True
        ):
            same = [hit.entry.entry_id for hit in answer.hits if hit.similarity > 0.99999]
            assert name in same
    assert server.end() == 0


def check(client: Client, acknowledged: dict, attempted: set) -> None:
    held = {entry.entry_id for entry in client.entries("storm")}
    assert acknowledged.keys() <= held <= attempted
    for name in list(held)[:20]:
        assert client.get_feature("storm", name).vector.shape == (32,)


def test_sigterm_finishes_calls_in_flight_and_exits_with_zero(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_DRAIN_DELAY_S="1")
    outcomes: list[object] = []
    with Client(server.wait_ready()) as client:
        client.create_collection("c", unlimited_retention=True)

        def enrol():
            crops = [NewEntry(jpeg(n, size=(600, 900)), f"e{n}") for n in range(40)]
            outcomes.extend(client.enrol_batch("c", crops))

        thread = threading.Thread(target=enrol)
        thread.start()
        time.sleep(0.15)
        server.process.send_signal(signal.SIGTERM)
        assert turns_not_serving(client.address)
        thread.join(30)
    assert server.end() == 0
    assert "draining" in server.log.read_text() and "stopped" in server.log.read_text()
    assert len(outcomes) == 40 and not any(isinstance(outcome, ReIDError) for outcome in outcomes)
    with pytest.raises(UnavailableError, match="resight serve"), Client(server_address(server), timeout_s=0.5) as late:
        late.info()


def turns_not_serving(address: str) -> bool:
    """Health says so while the server still answers."""
    with grpc.insecure_channel(address) as channel:
        for _ in range(100):
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            if reply.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                return True
            time.sleep(0.01)
    return False


def server_address(server: ServerProcess) -> str:
    return server.log.read_text().partition("serving ")[2].split()[0]


def test_overload_is_refused_at_once_and_retrying_clients_succeed(bundle_path, tmp_path):
    server = ServerProcess(
        bundle_path, tmp_path / "data", RESIGHT_MAX_QUEUE="64", RESIGHT_MAX_BATCH="1", RESIGHT_BATCH_DELAY_S="0.02"
    )
    address = server.wait_ready()
    outcomes: list[object] = []

    def load():
        with Client(address, timeout_s=20) as own:
            try:
                outcomes.extend(own.embed_batch([jpeg(1)] * 40))
            except ReIDError as error:
                outcomes.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, ReIDError)]
    assert all(isinstance(refusal, OverloadedError) and refusal.retry_after_s > 0 for refusal in refusals)
    assert sum(isinstance(outcome, np.ndarray) for outcome in outcomes) >= 80
    with Client(address) as client:
        client.embed(jpeg(1))
    assert server.end() == 0


def test_expired_entries_are_never_returned_and_soon_deleted_from_disk(bundle_path, tmp_path):
    from datetime import timedelta

    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_PURGE_INTERVAL_S="0.2")
    with Client(server.wait_ready()) as client:
        client.create_collection("short", ttl=timedelta(seconds=1), keep_crops=True)
        crop = jpeg(1)
        client.enrol("short", NewEntry(crop, "e", "SUBJECT-IN-CLEAR"))
        assert client.search("short", crop).hits[0].entry.entry_id == "e"
        time.sleep(1.0)
        assert client.search("short", crop).hits == () and client.collection("short").entry_count == 0
        for _ in range(200):
            files = [path.read_bytes() for path in (tmp_path / "data").iterdir()]
            if not any(b"SUBJECT-IN-CLEAR" in data or crop[200:400] in data for data in files):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("an expired entry is still on the disk")
    assert server.end() == 0
