"""A client's way to a server: TLS, the client's own certificate, and the token that goes with every call."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from resight.errors import InputError

HEADER = "authorization"


def channel_credentials(
    *, tls_ca: Path | None = None, tls_cert: Path | None = None, tls_key: Path | None = None
) -> grpc.ChannelCredentials | None:
    """What a secure channel needs; None = plaintext, where no file is given.

    Args:
        tls_ca: PEM authorities that the server's certificate must come from.
        tls_cert: PEM certificate of this client with its chain, for servers that ask for one.
        tls_key: PEM private key of it.

    Raises:
        InputError: a file cannot be read, or one that another needs is missing.
    """
    if (tls_cert is None) != (tls_key is None):
        raise InputError("a client's certificate and its key come together: give both or none")
    if tls_ca is None:
        if tls_cert is not None:
            raise InputError("a client's certificate needs TLS: give tls_ca, the authorities that sign the server's")
        return None
    return grpc.ssl_channel_credentials(
        _read(tls_ca), None if tls_key is None else _read(tls_key), None if tls_cert is None else _read(tls_cert)
    )


def check_token(address: str, token: str | None, *, secure: bool) -> None:
    """Refuse a token that cannot be sent, or would go to another machine in clear.

    Raises:
        InputError: it is not printable ASCII without spaces, or there is no TLS and the address is not on loopback.
    """
    if token is None:
        return
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("a token is one word of printable ASCII, such as `resight token create` prints")
    if not secure and not _is_loopback(address):
        raise InputError(
            f"the token would travel to {address} in clear: give tls_ca (RESIGHT_TLS_CA), the PEM file of the "
            "authorities that sign the server's certificate"
        )


def open_channel(
    address: str, options: Sequence[tuple[str, Any]], credentials: grpc.ChannelCredentials | None, token: str | None
) -> grpc.Channel:
    """A channel whose calls carry the token.

    Raises:
        InputError: see `check_token`.
    """
    check_token(address, token, secure=credentials is not None)
    if credentials is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, credentials, options=options)
    return channel if token is None else grpc.intercept_channel(channel, Bearer(token))


def bearer(token: str) -> tuple[str, str]:
    """The metadata of a call that shows a token."""
    return HEADER, f"Bearer {token}"


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # generic in the stubs only
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Adds the token to every call, unary or streaming."""

    def __init__(self, token: str) -> None:
        self._own = bearer(token)

    def _sent(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), self._own)
        return continuation(
            _Details(
                details.method,
                details.timeout,
                metadata,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary: Any = _sent
    intercept_unary_stream: Any = _sent
    intercept_stream_unary: Any = _sent
    intercept_stream_stream: Any = _sent


def _is_loopback(address: str) -> bool:
    """Whether an address stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].rpartition("/")[2].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}: name a PEM file") from error
