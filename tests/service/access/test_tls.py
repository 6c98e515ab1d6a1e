"""TLS over real sockets: certificates renewed while serving, client certificates, invalid files."""

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
import time
import warnings

import grpc
import pytest
from certs import Authority
from cryptography import x509
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from resight.client.transport import channel_credentials
from resight.errors import InputError, StartupError
from resight.service.access import tls as module
from resight.service.access.tls import Certificates, TlsFiles


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path)


@contextlib.asynccontextmanager
async def serving(certificates: Certificates):
    server, status = grpc.aio.server(), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    port = server.add_secure_port("127.0.0.1:0", certificates.credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def seen(address: str, authority: Authority, *, server_name: str = "localhost") -> tuple[str, str]:
    """Common name and TLS version that OpenSSL's own client meets at a new connection."""
    context = ssl.create_default_context(cafile=authority.ca)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as plain:
        with context.wrap_socket(plain, server_hostname=server_name) as wrapped:
            found = x509.load_der_x509_certificate(wrapped.getpeercert(True))
            return found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value, str(wrapped.version())


async def check(channel: grpc.aio.Channel) -> int:
    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return reply.status


def test_a_renewed_certificate_is_used_from_the_next_connection(authority):
    certificate, key = authority.issue("first", at="server")

    async def body():
        async with serving(Certificates(TlsFiles(certificate, key, None))) as address:
            credentials = channel_credentials(tls_ca=authority.ca)
            async with grpc.aio.secure_channel(address, credentials) as standing:
                assert await check(standing) == health_pb2.HealthCheckResponse.SERVING
                assert await asyncio.to_thread(seen, address, authority) == ("first", "TLSv1.3")
                authority.issue("second", at="server")
                assert (await asyncio.to_thread(seen, address, authority))[0] == "second"
                assert await check(standing) == health_pb2.HealthCheckResponse.SERVING  # on its old connection
                async with grpc.aio.secure_channel(address, credentials) as new:
                    assert await check(new) == health_pb2.HealthCheckResponse.SERVING
                authority.issue("third", at="server")
                assert (await asyncio.to_thread(seen, address, authority))[0] == "third"

    asyncio.run(body())


def test_a_reconnecting_channel_sees_the_new_authority(tmp_path):
    """The old certificate's authority is trusted no more, so only the new certificate can let the channel in."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    certificate, key = old.issue("a", at="server")
    certificates = Certificates(TlsFiles(certificate, key, None))

    async def body():
        async with serving(certificates) as address:
            options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
            async with grpc.aio.secure_channel(address, channel_credentials(tls_ca=new.ca), options) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await check(channel)
                assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
                new.issue("b", at="server")
                for _ in range(50):
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        assert await check(channel) == health_pb2.HealthCheckResponse.SERVING
                        return
                    await asyncio.sleep(0.1)
                raise AssertionError("the channel never got in")

    asyncio.run(body())


def test_mismatched_files_keep_the_old_certificate(authority, caplog):
    certificate, key = authority.issue("first", at="server")
    good, other = certificate.read_bytes(), authority.issue("second")

    async def body():
        async with serving(Certificates(TlsFiles(certificate, key, None))) as address:
            for spoiled in (other[0].read_bytes(), b"nothing", good[:200]):
                certificate.write_bytes(spoiled)
                assert (await asyncio.to_thread(seen, address, authority))[0] == "first"
            certificate.unlink()
            assert (await asyncio.to_thread(seen, address, authority))[0] == "first"
            other[0].replace(certificate)
            other[1].replace(key)
            assert (await asyncio.to_thread(seen, address, authority))[0] == "second"

    with caplog.at_level(logging.INFO):
        asyncio.run(body())
    assert "does not match" in caplog.text and "no PEM certificate" in caplog.text
    assert "the old certificate remains in use" in caplog.text and "TLS files changed" in caplog.text


def test_mtls_accepts_only_clients_of_the_authority(tmp_path, authority):
    certificate, key = authority.issue("server")
    mine, mine_key = authority.issue("client")
    stranger = Authority(tmp_path, "stranger")
    theirs, theirs_key = stranger.issue("other")

    async def outcome(address: str, **own) -> object:
        async with grpc.aio.secure_channel(address, channel_credentials(tls_ca=authority.ca, **own)) as channel:
            try:
                return await check(channel)
            except grpc.aio.AioRpcError as failed:
                return failed.code()

    async def body():
        async with serving(Certificates(TlsFiles(certificate, key, authority.ca))) as address:
            assert await outcome(address) is grpc.StatusCode.UNAVAILABLE
            assert await outcome(address, tls_cert=theirs, tls_key=theirs_key) is grpc.StatusCode.UNAVAILABLE
            assert await outcome(address, tls_cert=mine, tls_key=mine_key) == health_pb2.HealthCheckResponse.SERVING
            authority.ca.write_bytes(stranger.ca.read_bytes())  # the list of authorities is followed too
            credentials = grpc.ssl_channel_credentials(ours, theirs_key.read_bytes(), theirs.read_bytes())
            async with grpc.aio.secure_channel(address, credentials) as channel:
                assert await check(channel) == health_pb2.HealthCheckResponse.SERVING

    ours = authority.ca.read_bytes()
    asyncio.run(body())


@pytest.mark.parametrize("newest, welcome", [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)])
def test_tls_below_1_2_is_rejected(authority, newest, welcome):
    certificate, key = authority.issue("server")

    def version(address: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that these versions are old is the point
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.load_verify_locations(authority.ca)
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as wrapped:
                return str(wrapped.version())

    async def body():
        async with serving(Certificates(TlsFiles(certificate, key, None))) as address:
            return await asyncio.to_thread(version, address)

    if welcome:
        assert asyncio.run(body()) == "TLSv1.2"
    else:
        with pytest.raises(ssl.SSLError):
            asyncio.run(body())


def test_a_key_readable_by_others_is_refused(authority):
    certificate, key = authority.issue("server")
    for mode in (0o604, 0o640, 0o660, 0o644):
        key.chmod(mode)
        with pytest.raises(StartupError, match=rf"accessible to other users \(mode {mode:04o}\): chmod 600"):
            Certificates(TlsFiles(certificate, key, None))
    key.chmod(0o400)
    Certificates(TlsFiles(certificate, key, None))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_key_of_another_user_may_be_group_readable(authority):
    certificate, key = authority.issue("server")
    os.chown(key, 12345, os.getgid())
    key.chmod(0o640)
    Certificates(TlsFiles(certificate, key, None))
    key.chmod(0o644)
    with pytest.raises(StartupError, match="accessible to other users"):
        Certificates(TlsFiles(certificate, key, None))


@pytest.mark.parametrize(
    "which, message", [(0, "no PEM certificate"), (1, "not an unencrypted private key"), (2, "no PEM certificate")]
)
def test_files_that_are_not_pem_are_refused_by_name(authority, which, message):
    files = [*authority.issue("server"), authority.ca]
    files[which].write_bytes(b"-----BEGIN NOTHING-----")
    with pytest.raises(StartupError, match=message) as refused:
        Certificates(TlsFiles(*files))
    assert files[which].name in str(refused.value)
    files[which].unlink()
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        Certificates(TlsFiles(*files))


def test_damage_anywhere_in_a_file_is_a_startup_error_or_harmless(authority):
    certificate, key = authority.issue("server")
    rng = random.Random(5)
    outcomes = []
    for path in (certificate, key, authority.ca):
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 3, 40))):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            path.write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.2 else bad)
            try:
                Certificates(TlsFiles(certificate, key, authority.ca)).credentials()
            except StartupError as error:
                outcomes.append(str(error))
        path.write_bytes(good)
    assert len(outcomes) > 60
    Certificates(TlsFiles(certificate, key, authority.ca))


def test_a_mismatched_key_and_an_expired_certificate_are_refused(authority):
    certificate, _ = authority.issue("server")
    _, other = authority.issue("other")
    with pytest.raises(StartupError, match="does not match"):
        Certificates(TlsFiles(certificate, other, None))
    ended, ended_key = authority.issue("ended", days=-1)
    with pytest.raises(StartupError, match=r"expired on .* renew it"):
        Certificates(TlsFiles(ended, ended_key, None))


def test_a_certificate_that_expires_soon_is_logged_once_a_day(authority, caplog, monkeypatch):
    Certificates(TlsFiles(*authority.issue("far", days=15), None))
    assert caplog.text == ""
    certificates = Certificates(TlsFiles(*authority.issue("near", days=13), None))
    assert certificates._reload() is None
    assert caplog.text.count("expires on") == 1 and "near.pem" in caplog.text
    later = time.monotonic() + module.WARN_EVERY_S + 1
    monkeypatch.setattr(module.time, "monotonic", lambda: later)
    assert certificates._reload() is None
    assert caplog.text.count("expires on") == 2


def test_a_clients_files_are_checked_before_it_connects(tmp_path, authority):
    certificate, key = authority.issue("client")
    assert channel_credentials() is None
    with pytest.raises(InputError, match="used together"):
        channel_credentials(tls_ca=authority.ca, tls_cert=certificate)
    with pytest.raises(InputError, match="give tls_ca"):
        channel_credentials(tls_cert=certificate, tls_key=key)
    with pytest.raises(InputError, match="cannot be read"):
        channel_credentials(tls_ca=tmp_path / "none.pem")
