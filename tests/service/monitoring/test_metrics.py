"""Metrics of a real server, read over HTTP and compared with its requests; the two probes; access control."""

import asyncio
import json
import ssl
import threading
import time
import urllib.error
import urllib.request

import grpc
import pytest
from certs import Authority
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerProcess, jpeg

from resight.client import Client, NewEntry, Query
from resight.errors import ReIDError
from resight.service.access.auth import Role, TokenFile, TokenLookup
from resight.service.monitoring.endpoint import EndpointSource
from resight.service.settings import Settings

pytestmark = pytest.mark.long


class Scraped:
    """One scrape; ``[name, label=value, ...]`` is the sum of the samples that have these labels."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"no sample {name} {labels}"
        return sum(found)


def get(url: str, token: str = "", context: ssl.SSLContext | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def url_of(server: ServerProcess) -> str:
    server.wait_ready()
    return str(json.loads((server.data / "server.json").read_text())["metrics"])


@pytest.fixture(scope="module")
def watched(bundle_path, tmp_path_factory):
    data = tmp_path_factory.mktemp("watched") / "data"
    process = ServerProcess(bundle_path, data, "--metrics", "127.0.0.1:0", RESIGHT_METRICS_COLLECTIONS="2")
    try:
        process.wait_ready()
        yield process
    finally:
        assert process.end() == 0, process.log.read_text()


def scrape(server: ServerProcess) -> Scraped:
    status, text = get(f"{url_of(server)}/metrics")
    assert status == 200
    return Scraped(text)


def test_metrics_count_requests(watched):
    with Client(watched.wait_ready()) as client:
        client.create_collection("counted", unlimited_retention=True)
        client.enrol_batch("counted", [NewEntry(jpeg(n), f"e{n}") for n in range(12)])
        for n in range(5):
            client.search("counted", jpeg(n))
        client.search_batch("counted", [Query(jpeg(n)) for n in range(3)])
        with pytest.raises(ReIDError):
            client.search("nowhere", jpeg(1))
        outcomes = client.embed_batch([jpeg(1), b"no image", jpeg(2)])
        assert isinstance(outcomes[1], ReIDError)
    found = scrape(watched)
    search = "/resight.v1.SearchService/Search"
    assert found.value("resight_requests_total", method=search, code="OK") == 5
    assert found.value("resight_requests_total", method=search, code="NOT_FOUND") == 1
    assert found.value("resight_request_seconds_count", method=search) == 6
    assert found.value("resight_errors_total", reason="COLLECTION_NOT_FOUND") == 1
    assert found.value("resight_errors_total", reason="IMAGE_UNDECODABLE") == 1  # an item of a batch
    assert found.value("resight_searches_total", decision="uncalibrated") == 8
    assert found.value("resight_stage_seconds_count", stage="search") == 6
    for stage in ("decode", "queue", "infer"):
        assert found.value("resight_stage_seconds_count", stage=stage) == 12 + 5 + 3 + 1
    assert found.value("resight_batch_size_sum") >= 12 + 5 + 3 + 2  # and the canary's
    assert 1 <= found.value("resight_batch_size_count") <= found.value("resight_batch_size_sum")
    assert found.value("resight_collection_entries", tenant="default", collection="counted") == 12
    assert found.value("resight_revision_lag", collection="counted") == 0
    assert found.value("resight_queue_depth") == 0 and found.value("resight_queue_limit") == 256
    assert found.value("resight_model_info", model="tiny-0", active="true") == 1
    assert found.value("resight_disk_free_bytes") > 0 and found.value("resight_disk_low") in (0, 1)
    assert found.value("process_resident_memory_bytes") > 0
    # present from the first scrape on, so that a rate over it is correct
    assert found.value("resight_shed_total", reason="OVERLOADED") == 0


def test_collections_beyond_the_bound_are_summed(watched):
    with Client(watched.wait_ready()) as client:
        for name in ("aa", "bb", "cc", "dd"):
            client.create_collection(name, unlimited_retention=True)
            client.enrol(name, NewEntry(jpeg(1)))
    found = scrape(watched)
    labels = {s.labels["collection"] for s in found.samples if s.name == "resight_collection_entries"}
    assert len(labels) == 3 and "_other" in labels
    assert found.value("resight_collection_entries", collection="_other") >= 2


def test_label_values_never_come_from_requests(watched):
    with Client(watched.wait_ready()) as client:
        client.create_collection("private", unlimited_retention=True)
        client.enrol("private", NewEntry(jpeg(3), "ENTRY-SECRET", "SUBJECT-SECRET", camera_id="CAMERA-SECRET"))
        with pytest.raises(ReIDError):
            client.search("made-up-by-a-request", jpeg(3))
    with grpc.insecure_channel(watched.wait_ready()) as channel:
        invented = channel.unary_unary("/invented.by.a.Request/Method")
        with pytest.raises(grpc.RpcError):
            invented(b"", timeout=5)
    text = get(f"{url_of(watched)}/metrics")[1]
    assert "SECRET" not in text and "made-up" not in text and "invented" not in text


def test_shed_load_is_counted_by_reason(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data", "--metrics", "127.0.0.1:0", RESIGHT_MAX_QUEUE="64")
    try:
        address = server.wait_ready()
        crops = [jpeg(n, size=(300, 600)) for n in range(64)]

        def load() -> None:
            with Client(address, timeout_s=20) as own:  # the client retries as often as it is refused
                own.embed_batch(crops)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        found = scrape(server)
        shed = found.value("resight_shed_total", reason="OVERLOADED")
        method = "/resight.v1.EmbeddingService/BatchEmbed"
        assert shed >= 1 and found.value("resight_requests_total", method=method, code="RESOURCE_EXHAUSTED") == shed
        assert found.value("resight_requests_total", method=method, code="OK") == 4
    finally:
        assert server.end() == 0


def test_probes_report_ready_and_not_ready_while_draining(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data", "--metrics", "127.0.0.1:0", RESIGHT_DRAIN_DELAY_S="2")
    url = url_of(server)
    assert get(f"{url}/livez") == (200, "ok\n") and get(f"{url}/readyz") == (200, "ok\n")
    assert get(f"{url}/other")[0] == 404
    server.process.terminate()
    deadline = time.monotonic() + 10
    while (answer := get(f"{url}/readyz"))[0] == 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answer[0] == 503 and get(f"{url}/livez")[0] == 200
    assert server.end() == 0


def test_a_blocked_event_loop_is_reported_by_other_threads(tmp_path):
    serving = health_pb2.HealthCheckResponse.SERVING

    async def refresh() -> None:
        pass

    async def status() -> int:
        return serving

    async def made() -> EndpointSource:
        settings = Settings(bundle=tmp_path, data=tmp_path)
        return EndpointSource(CollectorRegistry(), refresh, status, TokenLookup(TokenFile(tmp_path)), settings)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stuck = threading.Event()
    try:
        watched = asyncio.run_coroutine_threadsafe(made(), loop).result(10)
        assert watched.alive() and watched.ready()
        loop.call_soon_threadsafe(stuck.wait, 60)  # blocks the event loop
        assert not watched.alive() and not watched.ready()
        stuck.set()
        assert watched.alive() and watched.ready()
    finally:
        stuck.set()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert not watched.alive() and not watched.ready()


def test_metrics_follow_the_rules_of_the_grpc_port(bundle_path, tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    token, _ = TokenFile(tmp_path / "data").create("prometheus", Role.OPERATOR)
    reader, _ = TokenFile(tmp_path / "data").create("camera", Role.READER)
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    server = ServerProcess(bundle_path, tmp_path / "data", "--metrics", "127.0.0.1:0", *files)
    try:
        url, context = url_of(server), ssl.create_default_context(cafile=str(authority.ca))
        assert url.startswith("https://")
        assert get(f"{url}/readyz", context=context)[0] == 200  # a kubelet has no token
        assert get(f"{url}/metrics", context=context)[0] == 401
        assert get(f"{url}/metrics", reader, context)[0] == 401
        assert get(f"{url}/metrics", token, context)[0] == 200
        assert token not in server.log.read_text()
    finally:
        assert server.end() == 0
    open_ = ServerProcess(bundle_path, tmp_path / "open", "--metrics", "0.0.0.0:0")
    assert open_.process.wait(60) != 0 and "can be reached from other machines" in open_.log.read_text()


def test_a_port_in_use_is_refused(bundle_path, tmp_path, watched):
    address = url_of(watched).removeprefix("http://")
    server = ServerProcess(bundle_path, tmp_path / "data", "--metrics", address)
    assert server.process.wait(60) != 0 and "cannot listen on" in server.log.read_text()
