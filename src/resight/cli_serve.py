"""The command ``resight serve``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer


def serve(
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder that `resight export` made.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the gallery; made when missing.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder of more bundles, for `resight models load`.")] = None,
    trusted_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--trusted-key", help="Minisign public key or file of one; may be repeated. Then bundles must be signed."
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT; port 0 takes a free one. [default: 127.0.0.1:50051]")
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="What runs the model: cpu, cuda, ort-tensorrt or tensorrt. [default: cpu]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Which graph of the bundle. [default: fp32]")] = None,
    device_id: Annotated[int | None, typer.Option(help="Which GPU. [default: 0]")] = None,
    engine_cache: Annotated[
        Path | None, typer.Option(help="Folder of TensorRT engines. [default: ~/.cache/resight/engines]")
    ] = None,
    reflection: Annotated[
        bool | None, typer.Option("--reflection/--no-reflection", help="Tell the API. [default: on loopback only]")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate with its chain; speaks TLS only.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate, mode 0600.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM authorities that clients must come from.")] = None,
    behind_tls_proxy: Annotated[
        bool | None, typer.Option("--behind-tls-proxy", help="Off loopback without TLS: a proxy before it has it.")
    ] = None,
    gallery: Annotated[str | None, typer.Option(help="embedded, or milvus://HOST:PORT. [default: embedded]")] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option("--metrics", help="HOST:PORT of /metrics, /livez and /readyz over HTTP. [default: none]"),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="Of the log: text or json. [default: text]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any setting; flags come first.")] = None,
) -> None:
    """Serve a bundle over gRPC until SIGTERM or Ctrl-C.

    Example: `resight serve --bundle lobby.bundle --data gallery`

    Once `resight token create` made a token in the data folder, every call needs one; other machines are
    answered only so, and only over TLS (docs/security.md).

    Every setting can also be given as an environment variable (RESIGHT_MAX_BATCH=16) or in the file.
    """
    flags = dict(locals())  # named as the settings are
    import asyncio

    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells each build it tries
    from resight.service.app import run
    from resight.service.logs import set_up_log
    from resight.service.settings import load_settings

    settings = load_settings(**flags)
    set_up_log(settings.log_format)
    asyncio.run(run(settings))
