"""The server's socket: who may reach it, under which limits, with TLS or without."""

from __future__ import annotations

import ipaddress

import grpc

from resight.errors import StartupError
from resight.service.guard import Guard
from resight.service.settings import Settings
from resight.service.tls import Certificates, TlsFiles
from resight.service.tokens import TokenFile

STREAMS_PER_CONNECTION = 100
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # 64 searches of 1000 hits without features take 10 MiB
MAX_METADATA_BYTES = 16 * 1024  # gRPC's own hard limit; set as the soft one too, so that none is refused by chance
KEEPALIVE_MS, MIN_CLIENT_PING_MS = 60_000, 30_000  # gRPC's own 5 minutes send eager clients away
CONNECTION_AGE_MS, CONNECTION_GRACE_MS = 30 * 60_000, 30_000  # lets DNS load balancing work


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_listen(settings: Settings) -> None:
    """Refuse addresses that other machines can reach, unless callers are authenticated and the way is encrypted.

    Raises:
        StartupError: authentication or encryption is missing.
    """
    for address in (settings.listen, settings.metrics_listen):
        if address is not None and not is_loopback(address.rpartition(":")[0].strip("[]")):
            _check_open(address, settings)


def _check_open(address: str, settings: Settings) -> None:
    told = f"{address} can be reached from other machines"
    if settings.auth != "tokens" and not TokenFile(settings.data).exists():
        raise StartupError(
            f"{told}, and nobody would be authenticated: make a token with `resight token create NAME --role admin "
            f"--data {settings.data}`, or listen on 127.0.0.1"
        )
    if settings.tls_cert is None and not settings.behind_tls_proxy:
        raise StartupError(
            f"{told}, and crops and tokens would travel in clear: give --tls-cert and --tls-key, say "
            "--behind-tls-proxy where a proxy with TLS stands before this port and nothing else reaches it, or listen "
            "on 127.0.0.1"
        )


def certificates(settings: Settings) -> Certificates | None:
    """The certificate to serve with; None = plaintext.

    Raises:
        StartupError: a file cannot be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificates(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def bind(settings: Settings, guard: Guard, tls: Certificates | None) -> tuple[grpc.aio.Server, int]:
    """A server that holds its port, not yet answering.

    Raises:
        StartupError: the address is taken or not ours.
    """
    options = [
        ("grpc.so_reuseport", 0),  # or a second server would share the port instead of being refused
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
    ]
    server = grpc.aio.server(interceptors=[guard], options=options, maximum_concurrent_rpcs=settings.max_rpcs)
    try:
        if tls is None:
            port = server.add_insecure_port(settings.listen)
        else:
            port = server.add_secure_port(settings.listen, tls.credentials())
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {settings.listen}: the port is taken or the address is not this machine's: stop the "
            "other server or choose another --listen (port 0 takes a free one)",
            listen=settings.listen,
        ) from error
    return server, port
