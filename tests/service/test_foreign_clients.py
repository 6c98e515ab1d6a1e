"""Third-party clients: buf and grpcurl through reflection, and Node from the .proto files."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import DIM, ServerProcess, features_by_hand, jpeg

from resight.client import Client, EntryId, NewEntry
from resight.service.access.auth import Role, TokenFile
from resight.service.app import SERVICES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "node"
CALL_S, INSTALL_S = 60, 180


def program(name: str) -> str:
    """A tool of the test environment or of the system; skips the test if there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        pytest.skip(f"no {name} here: buf comes with the dev extra, grpcurl and node with the system")
    return found


def run(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=CALL_S)
    return done.returncode, done.stdout, done.stderr


class Tool:
    """A command line tool that uses the server's reflection."""

    def __init__(self, name: str, address: str) -> None:
        self._name, self._program, self._address = name, program(name), address

    def listed(self) -> set[str]:
        """Names of services."""
        if self._name == "grpcurl":
            return set(self._run("-plaintext", self._address, "list").splitlines())
        output = self._run(*self._buf("grpc-v1"), "--list-methods", f"http://{self._address}")
        return {line.partition("/")[0] for line in output.splitlines()}

    def call(self, method: str, request: object, *, reflection: str = "grpc-v1") -> dict[str, Any]:
        """The answer of a method, as JSON."""
        data = ("-d", json.dumps(request))
        if self._name == "grpcurl":
            output = self._run("-plaintext", *data, self._address, method)
        else:
            output = self._run(*self._buf(reflection), *data, f"http://{self._address}/{method}")
        answer = json.loads(output)
        assert isinstance(answer, dict)
        return answer

    def failing(self, method: str, request: object) -> str:
        """The output for a failing call."""
        flags = ["-plaintext"] if self._name == "grpcurl" else self._buf("grpc-v1")
        target = [self._address, method] if self._name == "grpcurl" else [f"http://{self._address}/{method}"]
        status, out, err = run([self._program, *flags, "-d", json.dumps(request), *target])
        assert status != 0
        return out + err

    def _buf(self, reflection: str) -> list[str]:
        return ["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", reflection]

    def _run(self, *arguments: str) -> str:
        status, out, err = run([self._program, *arguments])
        assert status == 0, err
        return out


@pytest.fixture(params=["buf", "grpcurl"])
def tool(request: pytest.FixtureRequest, address: str) -> Tool:
    return Tool(request.param, address)


def encoded(crop: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(crop).decode()}


def test_every_service_is_found_by_reflection(tool: Tool) -> None:
    assert {*SERVICES, "grpc.health.v1.Health"} <= tool.listed()


def test_a_crop_is_embedded_by_reflection_alone(tool: Tool) -> None:
    answer = tool.call("resight.v1.EmbeddingService/Embed", {"image": encoded(jpeg(1))})
    feature = np.frombuffer(base64.b64decode(answer["embedding"]["float32Le"]), "<f4")
    assert feature.shape == (DIM,)
    assert float(feature @ features_by_hand([jpeg(1)])[0]) > 0.99999


def test_people_are_enrolled_and_found(tool: Tool, client: Client, collection: str) -> None:
    for person in (1, 2):
        entry = {"entryId": f"p{person}", "cameraId": "door"}
        request = {"collectionId": collection, "entry": entry, "image": encoded(jpeg(person))}
        assert tool.call("resight.v1.GalleryService/EnrollEntry", request)["entry"]["entryId"] == f"p{person}"
    client.enrol(collection, NewEntry(jpeg(3), entry_id="p3"))  # entries are shared with other clients
    search = {"collectionId": collection, "image": encoded(jpeg(2, 1)), "topK": 3}
    hits = tool.call("resight.v1.SearchService/Search", search)["hits"]
    assert hits[0]["entry"]["entryId"] == "p2" and len(hits) == 3
    mine = client.search(collection, EntryId("p2"), top_k=2).hits
    assert {hit.entry.entry_id for hit in mine} == {"p1", "p3"}


def test_health_is_served_to_probes(tool: Tool) -> None:
    for service in ("", *SERVICES):
        assert tool.call("grpc.health.v1.Health/Check", {"service": service}) == {"status": "SERVING"}


def test_an_error_arrives_with_its_reason(tool: Tool) -> None:
    request = {"collectionId": "nowhere", "entryId": "a"}
    output = tool.failing("resight.v1.SearchService/Search", request)
    assert "create it first" in output and "google.rpc.ErrorInfo" in output


def test_older_tools_find_reflection_v1alpha(address: str) -> None:
    tool = Tool("buf", address)
    assert tool.call("grpc.health.v1.Health/Check", {}, reflection="grpc-v1alpha") == {"status": "SERVING"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node example with the packages of its lock file."""
    npm, _ = program("npm"), program("node")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not answer within {INSTALL_S} s: is its registry out of reach?")
    if done.returncode:
        pytest.skip(f"npm could not install the example's packages: {done.stderr.strip().splitlines()[-1][:200]}")
    return folder


class Node:
    """Runs the example as a process."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address, self.env = folder, address, {"RESIGHT_PROTO": str(ROOT / "proto")}

    def __call__(self, *flags: str) -> tuple[int, list[dict[str, Any]], str]:
        """Exit status, JSON lines and stderr."""
        command = [program("node"), "search.mjs", "--server", self._address, *flags]
        status, out, err = run(command, cwd=self._folder, env=os.environ | self.env)
        return status, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def node(installed: Path, address: str) -> Node:
    return Node(installed, address)


@pytest.mark.slow
def test_node_enrols_and_searches(node: Node, client: Client, collection: str, tmp_path: Path) -> None:
    crops = tmp_path / "crops"
    crops.mkdir()
    for person in range(4):
        (crops / f"person{person}.jpg").write_bytes(jpeg(person))
    query = tmp_path / "query.jpg"
    query.write_bytes(jpeg(2, 1))
    flags = ("--collection", collection, "--camera", "door", "--crops", str(crops), "--query", str(query))
    status, output, err = node(*flags)
    assert status == 0, err
    assert output[0] == {"health": "SERVING"} and output[1]["server"]
    assert [line["enrolled"] for line in output[2:6]] == [f"person{person}" for person in range(4)]
    assert output[6]["hits"][0]["entry"] == "person2" and output[6]["hits"][0]["camera"] == "door"
    ours = client.search(collection, query.read_bytes(), top_k=3).hits
    assert [hit["entry"] for hit in output[6]["hits"]] == [hit.entry.entry_id for hit in ours]
    assert [hit["cosine"] for hit in output[6]["hits"]] == pytest.approx([hit.similarity for hit in ours], abs=1e-5)
    again, output, err = node("--collection", collection, "--query", str(query), "--exclude", "door")
    assert again == 0 and output[-1]["hits"] == [], err


@pytest.mark.slow
def test_node_gets_rich_errors(node: Node, tmp_path: Path) -> None:
    query = tmp_path / "query.jpg"
    query.write_bytes(b"no image")
    status, _, err = node("--collection", "NOT A NAME", "--query", str(query))
    assert status == 1 and err.startswith("INVALID_ARGUMENT: a collection name has")


@pytest.mark.slow
def test_node_sends_a_token(installed: Path, bundle_path: Path, tmp_path: Path) -> None:
    token, _ = TokenFile(tmp_path / "data").create("node", Role.OPERATOR)
    server = ServerProcess(bundle_path, tmp_path / "data")
    try:
        node = Node(installed, server.wait_ready())
        query = tmp_path / "query.jpg"
        query.write_bytes(jpeg(1))
        status, _, err = node("--query", str(query))
        assert status == 1 and err.startswith("UNAUTHENTICATED: ")
        node.env["RESIGHT_TOKEN"] = token
        status, output, err = node("--query", str(query))
        assert status == 0 and output[-1]["hits"] == [], err
    finally:
        assert server.end() == 0
