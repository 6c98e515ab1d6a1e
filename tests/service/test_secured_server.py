"""A server process with TLS and tokens on a non-loopback address, used from Python and from the command line."""

import contextvars
import time
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from certs import Authority
from serving import ServerProcess, jpeg
from typer.testing import CliRunner, Result

from resight.cli.main import app
from resight.cli.options import connect as connect_from_cli
from resight.client import Client, NewEntry
from resight.errors import (
    InputError,
    NotFoundError,
    PermissionDeniedError,
    ReIDError,
    UnauthenticatedError,
    UnavailableError,
)
from resight.service.access.auth import Role, TokenFile
from resight.service.app import MAX_METADATA_BYTES
from resight.v1 import admin_pb2, admin_pb2_grpc


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("secure") / "data"


@pytest.fixture(scope="module")
def tokens(data):
    file = TokenFile(data)
    return {role: file.create(role.word, role)[0] for role in Role}


@pytest.fixture(scope="module")
def secure(bundle_path, data, authority, tokens):
    """``0.0.0.0`` with TLS and client certificates."""
    certificate, key = authority.issue("first", at="server")
    flags = ("--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", authority.ca)
    server = ServerProcess(bundle_path, data, *map(str, flags), listen="0.0.0.0:0")
    try:
        port = server.wait_ready().rpartition(":")[2]
        server.local = f"127.0.0.1:{port}"
        yield server
    finally:
        assert server.end() == 0, server.log.read_text()
    log = server.log.read_text()
    assert not any(secret in log or secret[4:] in log for secret in tokens.values())


@pytest.fixture
def connect(secure, authority):
    certificate, key = authority.issue("client")
    files = {"tls_ca": authority.ca, "tls_cert": certificate, "tls_key": key}
    return lambda token, **other: Client(secure.local, token=token, timeout_s=10, **(files | other))


def test_each_role_has_exactly_its_permissions(connect, tokens):
    with connect(tokens[Role.OPERATOR]) as operator:
        operator.create_collection("lobby", unlimited_retention=True)
    with connect(tokens[Role.ENROLLER]) as enroller:
        enroller.enrol("lobby", NewEntry(jpeg(1), "one"))
        with pytest.raises(PermissionDeniedError, match="requires the role operator"):
            enroller.delete_collection("lobby", force=True)
    with connect(tokens[Role.READER]) as reader:
        assert reader.search("lobby", jpeg(1)).hits[0].entry.entry_id == "one"
        assert reader.info().space_id
        with pytest.raises(PermissionDeniedError, match="requires the role enroller"):
            reader.enrol("lobby", NewEntry(jpeg(2), "two"))
    for wrong in (None, "rst_nonsense"):
        with connect(wrong) as stranger:
            stranger.wait_ready(5)
            with pytest.raises(UnauthenticatedError):
                stranger.search("lobby", jpeg(1))


def test_an_enroller_cannot_exceed_the_time_to_live(connect, tokens):
    later, soon = datetime.now(UTC) + timedelta(days=2), datetime.now(UTC) + timedelta(hours=20)
    with connect(tokens[Role.OPERATOR]) as operator, connect(tokens[Role.ENROLLER]) as enroller:
        operator.create_collection("brief", ttl=timedelta(days=1))
        with pytest.raises(InputError, match="expire after 1 days, this one would expire later") as refused:
            enroller.enrol("brief", NewEntry(jpeg(1), "one", expire_time=later))
        assert refused.value.field == "entry.expire_time"
        items = [NewEntry(jpeg(1), "one", expire_time=soon), NewEntry(jpeg(2), "two", expire_time=later)]
        one, two = enroller.enrol_batch("brief", items)
        assert one.expire_time == soon and isinstance(two, InputError)
        with pytest.raises(InputError, match="have an operator set it"):
            enroller.update_entry("brief", "one", expire_time=later)
        enroller.update_entry("brief", "one", expire_time=soon - timedelta(hours=1))
        assert operator.update_entry("brief", "one", expire_time=later).expire_time == later
        assert operator.enrol("brief", NewEntry(jpeg(2), "two", expire_time=later)).expire_time == later
        operator.create_collection("for-good", unlimited_retention=True)
        assert enroller.enrol("for-good", NewEntry(jpeg(1), expire_time=later)).expire_time == later


def test_clients_without_a_certificate_of_the_authority_are_rejected(secure, authority, tokens, tmp_path):
    stranger = Authority(tmp_path, "stranger")
    certificate, key = stranger.issue("other")
    files = [{"tls_ca": authority.ca}, {"tls_ca": authority.ca, "tls_cert": certificate, "tls_key": key}]
    for own in (*files, {"tls_ca": stranger.ca}):
        with Client(secure.local, token=tokens[Role.ADMIN], timeout_s=1, **own) as client:
            with pytest.raises(UnavailableError):
                client.info()
    with pytest.raises(UnavailableError), Client(secure.local, timeout_s=1) as plain:
        plain.info()


def test_renewed_certificates_and_revoked_tokens_take_effect_without_a_restart(connect, secure, authority, data):
    secret, _ = TokenFile(data).create("leaver", Role.READER)
    with connect(secret) as client:
        wait_until(lambda: client.info() is not None, UnauthenticatedError)
        authority.issue("second", at="server")
        with connect(secret) as new:
            assert new.info()
        assert "TLS files changed" in secure.log.read_text()
        TokenFile(data).revoke("leaver")
        with pytest.raises(UnauthenticatedError, match="revoked"):
            wait_until(lambda: client.info() is None)


def wait_until(done, ignored: type[Exception] = AssertionError) -> None:
    for _ in range(200):
        try:
            if done():
                return
        except ignored:
            pass
        time.sleep(0.05)
    raise AssertionError("it never happened")


@pytest.fixture
def command(monkeypatch):
    """Runs a command line in this process; what goes wrong is the error itself."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object, **env: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], env={k: str(v) for k, v in env.items()})
        if isinstance(result.exception, ReIDError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def test_the_command_line_creates_lists_uses_and_revokes_tokens(command, secure, authority, data, tmp_path):
    made = command("token", "create", "tool", "--role", "operator", "--expires", "90d", "--data", data)
    secret = made.stdout.strip()
    assert secret.startswith("rst_") and len(made.stdout.split()) == 1
    assert secret not in made.stderr and "shown only once" in made.stderr
    shown = command("token", "list", "--data", data).stdout
    assert "tool" in shown and "operator" in shown and "rst_" not in shown
    (tmp_path / "token").write_text(made.stdout)
    certificate, key = authority.issue("client")
    env = {"RESIGHT_TLS_CA": authority.ca, "RESIGHT_CLIENT_CERT": certificate, "RESIGHT_CLIENT_KEY": key}
    env |= {"RESIGHT_SERVER": secure.local}
    wait_until(lambda: command("gallery", "list", **env, RESIGHT_TOKEN=secret), UnauthenticatedError)
    command("gallery", "list", **env, RESIGHT_TOKEN_FILE=tmp_path / "token")
    command("--token-file", tmp_path / "token", "gallery", "list", **env)
    with pytest.raises(UnauthenticatedError, match="a token is required"):
        command("gallery", "list", **env)
    with pytest.raises(InputError, match="cannot be read"):
        command("gallery", "list", **env, RESIGHT_TOKEN_FILE=tmp_path / "none")
    assert "revoked 1 of tool" in command("token", "revoke", "tool", "--data", data).stdout
    with pytest.raises(NotFoundError):
        command("token", "revoke", "tool", "--data", data)
    with pytest.raises(InputError, match="such as 90d"):
        command("token", "create", "tool", "--role", "reader", "--expires", "soon", "--data", data)


def test_the_client_library_reads_connection_settings_from_the_environment(secure, authority, monkeypatch, tokens):
    certificate, key = authority.issue("client")
    for name, path in {"TLS_CA": authority.ca, "CLIENT_CERT": certificate, "CLIENT_KEY": key}.items():
        monkeypatch.setenv(f"RESIGHT_{name}", str(path))
    monkeypatch.setenv("RESIGHT_TOKEN", tokens[Role.READER])
    with contextvars.Context().run(connect_from_cli, secure.local) as client:
        client.wait_ready(5)
        assert client.info()


def test_metadata_over_the_limit_is_rejected_before_the_request_is_read(address):
    with grpc.insecure_channel(address) as channel:
        info = admin_pb2_grpc.AdminServiceStub(channel).GetServerInfo
        info(admin_pb2.GetServerInfoRequest(), metadata=(("x-much", "a" * (MAX_METADATA_BYTES // 2)),), timeout=10)
        with pytest.raises(grpc.RpcError) as refused:
            info(admin_pb2.GetServerInfoRequest(), metadata=(("x-much", "a" * MAX_METADATA_BYTES),), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_log_line_of_a_call_has_its_request_id(bundle_path, tmp_path):
    TokenFile(tmp_path / "data").create("anna", Role.READER)
    server = ServerProcess(bundle_path, tmp_path / "data")
    with grpc.insecure_channel(server.wait_ready()) as channel:
        info = admin_pb2_grpc.AdminServiceStub(channel).GetServerInfo
        with pytest.raises(grpc.RpcError) as refused:
            info(admin_pb2.GetServerInfoRequest(), metadata=(("x-request-id", "my-id-1"),), timeout=10)
        assert dict(refused.value.trailing_metadata())["x-request-id"] == "my-id-1"
    assert server.end() == 0
    assert "request=my-id-1 rejected /resight.v1.AdminService/GetServerInfo" in server.log.read_text()
    with pytest.raises(InputError, match="in plaintext"):
        Client("gallery.example:50051", token="rst_x")
