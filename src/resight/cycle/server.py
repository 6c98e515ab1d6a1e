"""Access to the site's server: a client with the site's credentials, the active model, and waiting for operations."""

from __future__ import annotations

import hashlib
from pathlib import Path

from resight.bundle.manifest import MANIFEST_FILE
from resight.client import Client
from resight.client.responses import ModelInfo, OperationInfo
from resight.cycle.site import SiteFile
from resight.cycle.state_folder import ActiveModel, StateFolder, read_active
from resight.errors import CycleError, DeadlineError, InputError, OverloadedError, UnavailableError

TRANSIENT_ERRORS = (UnavailableError, OverloadedError, DeadlineError, OSError)  # a retry may succeed
OPERATION_TIMEOUT_S = 86_400.0  # a migration may take hours; the cycle's own budget is shorter


def connect(site: SiteFile) -> Client:
    """A client of the site's server.

    Raises:
        InputError: the token's file cannot be read, or the token would be sent unencrypted.
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


def access_options(site: SiteFile) -> list[str]:
    """The same access as global options of `resight`."""
    service = site.service
    given = {
        "--token-file": service.token_file,
        "--tls-ca": service.tls_ca,
        "--client-cert": service.client_cert,
        "--client-key": service.client_key,
    }
    return [text for name, path in given.items() if path is not None for text in (name, str(path))]


def active_model_info(client: Client) -> ModelInfo:
    """The default model of the server."""
    return next(one for one in client.models() if one.active)


def find_active_model(site: SiteFile, layout: StateFolder, client: Client) -> ActiveModel:
    """The model that is active on the server, with its checkpoint if `active.json` contains it.

    The server decides, because models may have been switched by hand.

    Raises:
        CycleError: the active model's bundle is not found on this machine.
    """
    found, chain = active_model_info(client), read_active(layout.active)
    for one in () if chain is None else chain.chain():
        if one.model_id == found.model_id:
            return one
    own = site.service.model_root / found.model_id
    for bundle in (own, site.service.bundle):
        if _manifest_digest(bundle) == found.sha256:
            return ActiveModel(found.model_id, str(bundle))
    raise CycleError(
        f"model {found.model_id} is active on {site.service.address}, and its bundle is neither {own} nor "
        f"{site.service.bundle}: let [service] model_root name the server's --models folder and bundle its --bundle"
    )


def _manifest_digest(bundle: Path) -> str:
    """SHA-256 of a bundle's manifest, as the server reports it; empty if there is no manifest."""
    manifest = bundle / MANIFEST_FILE
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""


def wait_for_operation(client: Client, operation: OperationInfo) -> OperationInfo:
    """Wait for an operation of the server.

    Raises:
        ReIDError: the operation failed with it.
        UnavailableError: the server stopped, or the operation was cancelled: retry.
    """
    done = client.wait(operation, timeout_s=OPERATION_TIMEOUT_S)
    if done.error is not None:
        raise done.error
    if done.state != "succeeded":
        raise UnavailableError(f"operation {done.operation_id} ({done.kind}) was {done.state}: it will be retried")
    return done
