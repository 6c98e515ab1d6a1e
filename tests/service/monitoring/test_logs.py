"""The log of a server after enrolment, search, erasure and errors contains no personal data."""

import base64
import json
import logging
import urllib.request

import grpc
import numpy as np
import pytest
from serving import ServerProcess, jpeg

from resight.client import Client, NewEntry
from resight.errors import ReIDError
from resight.service.access.auth import Role, TokenFile
from resight.service.access.interceptors import RequestIdFilter
from resight.service.monitoring.setup import json_formatter
from resight.v1 import gallery_pb2, gallery_pb2_grpc

SUBJECT, ENTRY, CAMERA, LABEL = "SUBJECT-q7", "ENTRY-q7", "CAMERA-q7", "LABEL-q7"


def pieces(data: bytes) -> list[str]:
    """How a crop or a feature could appear in a log line: parts of its bytes as base64, hex and Python literal."""
    middle = data[len(data) // 2 : len(data) // 2 + 24]
    return [base64.b64encode(data)[40:60].decode(), base64.b64encode(middle).decode()[:16], middle.hex(), repr(middle)]


def put_through(address: str, token: str) -> list[str]:
    """Enrol, search, cause errors, erase; returns the strings that must not be in the log."""
    crop = jpeg(1)
    secrets = [SUBJECT, ENTRY, CAMERA, LABEL, token, token[8:24], *pieces(crop)]
    with Client(address, token=token) as client:
        client.create_collection("people", unlimited_retention=True, keep_crops=True)
        new = NewEntry(crop, ENTRY, SUBJECT, camera_id=CAMERA, labels={LABEL: LABEL})
        client.enrol("people", new)
        feature = client.get_feature("people", ENTRY).vector
        secrets += [*pieces(np.asarray(feature, "<f4").tobytes()), str(float(feature[0]))[:9], repr(feature[1])]
        assert client.search("people", crop).hits[0].entry.entry_id == ENTRY
        for wrong in (
            lambda: client.enrol("people", new),
            lambda: client.enrol("people", NewEntry(crop[:200], ENTRY + "-2", SUBJECT)),
            lambda: client.search("people", b"\xff\xd8" + crop[300:]),
            lambda: client.get_feature("people", ENTRY + "-3"),
            lambda: client.search("nowhere", crop),
        ):
            with pytest.raises(ReIDError):
                wrong()
    with grpc.insecure_channel(address) as channel:
        gallery = gallery_pb2_grpc.GalleryServiceStub(channel)
        request = gallery_pb2.EraseSubjectRequest(collection_id="people", subject_id=SUBJECT, reason=LABEL)
        with pytest.raises(grpc.RpcError):
            gallery.EraseSubject(request, timeout=10, metadata=(("authorization", f"Bearer {token}-bad"),))
        good = (("authorization", f"Bearer {token}"),)
        assert gallery.EraseSubject(request, timeout=10, metadata=good).erased_count == 1
    return secrets


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_crop_feature_token_or_personal_name_is_in_the_log(bundle_path, tmp_path, form):
    token, _ = TokenFile(tmp_path / "data").create("site", Role.ADMIN)
    flags = ("--log-format", form, "--metrics", "127.0.0.1:0")
    server = ServerProcess(bundle_path, tmp_path / "data", *flags, RESIGHT_PURGE_INTERVAL_S="0.2")
    try:
        secrets = put_through(server.wait_ready(), token)
        url = json.loads((tmp_path / "data" / "server.json").read_text())["metrics"]
        scrape = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(scrape, timeout=10) as answer:
            metrics = answer.read().decode()
    except BaseException:
        server.end()
        raise
    assert server.end() == 0
    text = server.log.read_text(errors="replace")
    assert "rejected" in text and "unknown token" in text  # errors were logged
    assert [secret for secret in secrets if secret in text or secret in metrics] == []
    if form == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        assert all({"time", "level", "logger", "request", "message"} <= line.keys() for line in lines)
        assert len({line["request"] for line in lines}) >= 2  # each call has its own id


def test_an_error_with_its_stack_stays_one_line():
    record = logging.LogRecord("resight.a", logging.ERROR, __file__, 1, "two\nlines of %s", ("it",), None)
    try:
        raise ValueError("deep")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    assert RequestIdFilter().filter(record)
    (line,) = json_formatter().format(record).splitlines()
    body = json.loads(line)
    assert body["message"] == "two\nlines of it" and body["request"] == "-" and body["level"] == "ERROR"
    assert "ValueError: deep" in body["stack"] and body["time"].endswith("+00:00")
