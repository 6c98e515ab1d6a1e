"""Traces of a real server, received by a test collector that speaks OTLP over gRPC."""

import subprocess
import sys
from concurrent import futures

import grpc
import pytest
from serving import ServerProcess, jpeg

from resight.client import Client, NewEntry
from resight.errors import NotFoundError
from resight.v1 import search_pb2, search_pb2_grpc

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="pip install 'resight[otel]'"
)


class Collector(grpc.GenericRpcHandler):
    """Collects the received spans."""

    def __init__(self) -> None:
        self.spans = []

    def service(self, handler_call_details):
        assert handler_call_details.method == "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
        return grpc.unary_unary_rpc_method_handler(
            self.export,
            request_deserializer=trace_service.ExportTraceServiceRequest.FromString,
            response_serializer=trace_service.ExportTraceServiceResponse.SerializeToString,
        )

    def export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service.ExportTraceServiceResponse()


@pytest.fixture
def collector():
    kept = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((kept,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield kept, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def attributes(span) -> dict[str, object]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_search_is_one_span_with_its_stages_in_the_callers_trace(bundle_path, tmp_path, collector):
    kept, endpoint = collector
    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_OTLP_ENDPOINT=endpoint)
    address = server.wait_ready()
    with Client(address) as client:
        client.create_collection("traced", unlimited_retention=True)
        client.enrol("traced", NewEntry(jpeg(1), "ENTRY-IN-CLEAR", "SUBJECT-IN-CLEAR"))
        with pytest.raises(NotFoundError):
            client.search("nowhere", jpeg(1))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with grpc.insecure_channel(address) as channel:
        request = search_pb2.SearchRequest(collection_id="traced", image={"data": jpeg(1)})
        search_pb2_grpc.SearchServiceStub(channel).Search(
            request, timeout=10, metadata=(("traceparent", f"00-{trace_id}-{parent}-01"), ("x-request-id", "abc-1"))
        )
    assert server.end() == 0, server.log.read_text()
    (call,) = [span for span in kept.spans if span.parent_span_id.hex() == parent]
    assert call.trace_id.hex() == trace_id and call.name == "resight.v1.SearchService/Search"
    found = attributes(call)
    assert found["rpc.method"] == "Search" and found["request_id"] == "abc-1" and found["rpc.grpc.status_code"] == 0
    stages = {span.name: span for span in kept.spans if span.parent_span_id == call.span_id}
    assert set(stages) == {"decode", "queue", "infer", "search"}
    for span in stages.values():
        assert call.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= call.end_time_unix_nano
    order = [stages[name].start_time_unix_nano for name in ("decode", "queue", "infer", "search")]
    assert order == sorted(order)
    (failed,) = [span for span in kept.spans if attributes(span).get("rpc.grpc.status_code") == 5]
    assert [event.name for event in failed.events] == ["refused"]
    assert b"IN-CLEAR" not in b"".join(span.SerializeToString() for span in kept.spans)


def test_an_unreachable_collector_affects_no_call(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_OTLP_ENDPOINT="http://127.0.0.1:1")
    with Client(server.wait_ready()) as client:
        client.embed(jpeg(1))
    assert server.end() == 0, server.log.read_text()


def test_without_the_packages_the_start_says_what_to_install():
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from resight.service.monitoring.tracing import Tracing\n"
        "try:\n    Tracing('http://127.0.0.1:1')\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("StartupError") and "pip install 'resight[otel]'" in output
