"""Fixtures of the service tests: one tiny bundle, one shared server, a collection for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from serving import ServerProcess, TokenServer

from resight.client import Client


@pytest.fixture(scope="session")
def server(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that change only their own collection."""
    process = ServerProcess(bundle_path, tmp_path_factory.mktemp("shared") / "data")
    try:
        process.wait_ready()
        yield process
    finally:
        assert process.end() == 0, process.log.read_text()


@pytest.fixture(scope="session")
def address(server: ServerProcess) -> str:
    return server.wait_ready()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as made:
        yield made


@pytest.fixture
def collection(client: Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty collection of this test, deleted afterwards."""
    name = "t-" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[:50]
    client.create_collection(name, unlimited_retention=True)
    yield name
    client.delete_collection(name, force=True)


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    """For calls through stubs."""
    with grpc.insecure_channel(address) as made:
        yield made


@pytest.fixture(scope="session")
def guarded(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    """A server that requires tokens, with one for each role in each of two tenants; for tests of permissions."""
    made = TokenServer(bundle_path, tmp_path_factory.mktemp("guarded") / "data")
    try:
        made.server.wait_ready()
        yield made
    finally:
        assert made.server.end() == 0, made.server.log.read_text()
