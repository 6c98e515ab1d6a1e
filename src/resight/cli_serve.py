"""The command ``resight serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    bundle: Annotated[Path | None, typer.Option(help="Bundle folder that `resight export` made.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the gallery; made when missing.")] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT; port 0 takes a free one. [default: 127.0.0.1:50051]")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Where the model runs: cpu or cuda. [default: cpu]")] = None,
    precision: Annotated[str | None, typer.Option(help="Which graph of the bundle. [default: fp32]")] = None,
    reflection: Annotated[
        bool | None, typer.Option("--reflection/--no-reflection", help="Tell the API. [default: on loopback only]")
    ] = None,
    insecure_listen: Annotated[
        bool | None, typer.Option("--insecure-listen", help="Listen off loopback, without authentication or TLS.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any setting; flags come first.")] = None,
) -> None:
    """Serve a bundle over gRPC until SIGTERM or Ctrl-C.

    Example: `resight serve --bundle lobby.bundle --data gallery`

    Every setting can also be given as an environment variable (RESIGHT_MAX_BATCH=16) or in the file.
    """
    import asyncio
    import logging

    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells each build it tries
    from resight.service.app import run
    from resight.service.settings import load_settings

    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = load_settings(
        config=config,
        bundle=bundle,
        data=data,
        listen=listen,
        provider=provider,
        precision=precision,
        reflection=reflection,
        insecure_listen=insecure_listen,
    )
    asyncio.run(run(settings))
