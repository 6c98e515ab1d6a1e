"""Unit tests of the client; its use with a server is tested in tests/service."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from datetime import UTC, datetime, timedelta, timezone
from typing import get_type_hints

import grpc
import pytest
from grpc_status import rpc_status

from resight.client import Client, EntryId, GivenFeature, NewEntry, OperationInfo, Query, Where
from resight.client.requests import SearchOptions
from resight.client.transport import MAX_ATTEMPTS, MAX_BATCH_BYTES, MAX_BATCH_ITEMS, backoff_s, split_batches
from resight.errors import DeadlineError, InputError, OverloadedError, ReIDError, UnavailableError
from resight.status import to_status
from resight.v1 import admin_pb2, admin_pb2_grpc, common_pb2


class Flaky(admin_pb2_grpc.AdminServiceServicer):
    """Raises the given errors, one per call, then replies."""

    def __init__(self) -> None:
        self.failures: list[ReIDError | float] = []
        self.calls: list[float] = []

    def GetServerInfo(self, request, context):
        self.calls.append(time.monotonic())
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, float):
                time.sleep(failure)
            else:
                context.abort_with_status(rpc_status.to_status(to_status(failure)))
        return admin_pb2.GetServerInfoResponse(server_version="1")


@pytest.fixture
def flaky() -> Iterator[tuple[Flaky, Client]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Flaky()
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}", timeout_s=5) as client:
        yield servicer, client
    server.stop(0).wait()


def test_a_call_is_retried_while_the_server_is_unavailable(flaky):
    servicer, client = flaky
    servicer.failures = [UnavailableError("warming up"), UnavailableError("warming up")]
    assert client.info().version == "1"
    assert len(servicer.calls) == 3


def test_an_unavailable_server_is_reported_after_a_few_attempts(flaky):
    servicer, client = flaky
    servicer.failures = [UnavailableError("draining")] * 99
    with pytest.raises(UnavailableError, match="draining"):
        client.info()
    assert len(servicer.calls) == MAX_ATTEMPTS


def test_the_retry_delay_of_an_overloaded_server_is_respected(flaky):
    servicer, client = flaky
    servicer.failures = [OverloadedError("full", retry_after_s=0.3), OverloadedError("full", retry_after_s=0.3)]
    client.info()
    first, second, third = servicer.calls
    assert second - first >= 0.3 and third - second >= 0.3


def test_a_pause_longer_than_the_deadline_is_not_started(flaky):
    servicer, client = flaky
    servicer.failures = [OverloadedError("full", retry_after_s=60)]
    with pytest.raises(OverloadedError) as refused:
        client.info()
    assert refused.value.retry_after_s == 60 and len(servicer.calls) == 1


def test_permanent_errors_are_not_retried(flaky):
    servicer, client = flaky
    servicer.failures = [InputError("bad", field="x", limit=3)]
    with pytest.raises(InputError, match="bad") as refused:
        client.info()
    assert (refused.value.field, refused.value.facts, len(servicer.calls)) == ("x", {"limit": "3"}, 1)


def test_a_silent_server_ends_in_a_deadline_error(flaky):
    servicer, client = flaky
    servicer.failures = [1.0]
    with Client(client.address, timeout_s=0.2) as hasty, pytest.raises(DeadlineError):
        hasty.info()


def test_without_a_server_the_error_names_the_command():
    with Client("127.0.0.1:1", timeout_s=0.3) as client:
        with pytest.raises(UnavailableError, match="resight serve"):
            client.info()
        with pytest.raises(UnavailableError, match="became ready"):
            client.wait_ready(0.2)


def test_wait_accepts_the_deprecated_keyword_told(flaky):
    _, client = flaky
    done = OperationInfo("o", "migrate", "succeeded", 1, 1, 0, 0, datetime.now(UTC), {})
    assert client.wait(done, on_update=lambda operation: None) == done
    with pytest.warns(DeprecationWarning, match="on_update") as caught:
        assert client.wait(done, told=lambda operation: None) == done
    assert caught[0].filename == __file__


def test_threads_share_a_client(flaky):
    _, client = flaky
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(client.info().version)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == ["1"] * 8


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, 0), (1, 10), (64, 10), (65, 10), (200, 10), (5, MAX_BATCH_BYTES // 2), (3, MAX_BATCH_BYTES * 2)],
)
def test_batches_keep_every_item_in_order_and_fit(count, size):
    items = [common_pb2.ImageCrop(data=number.to_bytes(2) + bytes(size)) for number in range(count)]
    parts = list(split_batches(items))
    assert [int.from_bytes(item.data[:2]) for part in parts for item in part] == list(range(count))
    for part in parts:
        assert 1 <= len(part) <= MAX_BATCH_ITEMS
        assert len(part) == 1 or sum(item.ByteSize() for item in part) <= MAX_BATCH_BYTES


def test_pauses_grow_up_to_a_limit_and_differ():
    error = UnavailableError("away")
    for number in range(MAX_ATTEMPTS - 1):
        assert 0.05 * 2**number <= backoff_s(error, number) <= 0.1 * 2**number
    assert backoff_s(error, MAX_ATTEMPTS - 1) is None
    assert backoff_s(OverloadedError("full", retry_after_s=2.0), 50) <= 2.8
    assert len({backoff_s(error, 0) for _ in range(20)}) > 1
    assert backoff_s(InputError("bad"), 0) is None


def test_each_kind_of_source_sets_its_own_field():
    assert Query(b"x").message("c").WhichOneof("query") == "image"
    assert Query([b"x", b"y"]).message("c").WhichOneof("query") == "shots"
    assert Query([]).message("c").WhichOneof("query") == "shots"
    assert Query(EntryId("e")).message("c").WhichOneof("query") == "entry_id"
    import numpy as np

    given = GivenFeature(np.arange(3, dtype=np.float32), "s")
    assert Query(given).message("c").embedding.float32_le == np.arange(3, dtype="<f4").tobytes()
    assert NewEntry(given).message("c", "r").WhichOneof("source") == "embedding"
    assert not Query(b"x").message("c").HasField("top_k") and Query(b"x", top_k=0).message("c").HasField("top_k")
    assert not Where().message().HasField("capture_window")


def test_the_options_of_search_are_the_fields_of_a_query():
    fields = [one.name for one in dataclasses.fields(Query)]
    assert ["source", *SearchOptions.__annotations__] == fields
    hints = get_type_hints(Query)
    for name, hint in get_type_hints(SearchOptions).items():
        assert hint in (hints[name], hints[name] | None), name


def test_the_client_loads_no_engine():
    code = (
        "import resight.client, sys\n"
        "print(sorted({'torch', 'faiss', 'onnxruntime', 'onnx', 'sqlite3', 'resight.service'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("offset_h", [-8, 0, 9])
def test_a_time_without_a_zone_is_refused_and_one_with_a_zone_is_exact(offset_h):
    naive = datetime(2026, 3, 1, 12)
    aware = naive.replace(tzinfo=timezone(timedelta(hours=offset_h)))
    message = NewEntry(b"x", capture_time=aware).message("lobby", "id")
    assert message.entry.capture_time.ToDatetime(tzinfo=UTC) == aware
    for build in (
        lambda: NewEntry(b"x", capture_time=naive).message("lobby", "id"),
        lambda: NewEntry(b"x", expire_time=naive).message("lobby", "id"),
        lambda: Where(start=naive).message(),
        lambda: Where(end=naive).message(),
    ):
        with pytest.raises(InputError, match="without a time zone"):
            build()


def test_no_method_sends_a_time_without_a_zone(flaky):
    _, client = flaky
    naive = datetime(2026, 3, 1, 12)
    for call in (
        lambda: client.update_entry("lobby", "a", expire_time=naive),
        lambda: client.search_statistics("lobby", start=naive),
        lambda: client.search_statistics("lobby", reference=(naive, naive)),
        lambda: list(client.audit_events(start=naive)),
    ):
        with pytest.raises(InputError, match="without a time zone"):
            call()
