"""Person re-identification that adapts itself to a site, without labels, and serves."""

from importlib.metadata import version

from resight.bundle import Manifest, open_bundle
from resight.errors import ReIDError
from resight.image import ImageSpec
from resight.similarity import cosine_similarity

__version__ = version("resight")
__all__ = ["ImageSpec", "Manifest", "ReIDError", "__version__", "cosine_similarity", "open_bundle"]
