"""What every stage asks the site's server: a client with the site's access, and which model is active."""

from __future__ import annotations

import hashlib
from pathlib import Path

from resight.answers import ModelInfo, OperationInfo
from resight.client import Client
from resight.cycle.active import Active, read_active
from resight.cycle.layout import Layout
from resight.cycle.site_file import SiteFile
from resight.errors import CycleError, DeadlineError, InputError, OverloadedError, UnavailableError
from resight.manifest import MANIFEST_FILE

PASSING = (UnavailableError, OverloadedError, DeadlineError, OSError)  # another try may help
WORK_S = 86_400.0  # a migration may take all day; the budget of the cycle ends it before that


def connect(site: SiteFile) -> Client:
    """A client of the site's server.

    Raises:
        InputError: the token's file cannot be read, or the token would travel in clear.
    """
    service, token = site.service, None
    if service.token_file is not None:
        try:
            token = service.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"token file {service.token_file} cannot be read: name the file with the token in [service]"
            ) from error
    return Client(
        service.address,
        token=token,
        tls_ca=service.tls_ca,
        tls_cert=service.client_cert,
        tls_key=service.client_key,
    )


def options(site: SiteFile) -> list[str]:
    """The same access as options before a command of `resight`."""
    service = site.service
    given = {
        "--token-file": service.token_file,
        "--tls-ca": service.tls_ca,
        "--client-cert": service.client_cert,
        "--client-key": service.client_key,
    }
    return [text for name, path in given.items() if path is not None for text in (name, str(path))]


def active_model(client: Client) -> ModelInfo:
    """The model that embeds what names none."""
    return next(one for one in client.models() if one.active)


def find_active(site: SiteFile, layout: Layout, client: Client) -> Active:
    """What the server has active, with its checkpoint where the chain knows it.

    It is the server's word that counts: somebody may have switched models by hand.

    Raises:
        CycleError: the active model's bundle is nowhere to be seen from here.
    """
    found, chain = active_model(client), read_active(layout.active)
    for one in () if chain is None else chain.chain():
        if one.model_id == found.model_id:
            return one
    own = site.service.model_root / found.model_id
    for bundle in (own, site.service.bundle):
        if _digest(bundle) == found.sha256:
            return Active(found.model_id, str(bundle))
    raise CycleError(
        f"model {found.model_id} is active on {site.service.address}, and its bundle is neither {own} nor "
        f"{site.service.bundle}: let [service] model_root name the server's --models folder and bundle its --bundle"
    )


def _digest(bundle: Path) -> str:
    """SHA-256 of a bundle's manifest, as the server tells it; empty where there is none."""
    manifest = bundle / MANIFEST_FILE
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""


def finished(client: Client, operation: OperationInfo) -> OperationInfo:
    """Wait for long work of the server.

    Raises:
        ReIDError: its own error.
        UnavailableError: the server ended meanwhile, or somebody cancelled it: ask again.
    """
    done = client.wait(operation, timeout_s=WORK_S)
    if done.error is not None:
        raise done.error
    if done.state != "succeeded":
        raise UnavailableError(f"operation {done.operation_id} ({done.kind}) was {done.state}: it is asked for again")
    return done
