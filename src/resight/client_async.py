"""Deprecated, for one release: `AsyncClient` lives in `resight.client`."""

import warnings

from resight.client import AsyncClient

__all__ = ["AsyncClient"]

warnings.warn(
    "import AsyncClient from resight.client instead of resight.client_async", DeprecationWarning, stacklevel=2
)
