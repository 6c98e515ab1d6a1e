"""Person re-identification: unsupervised adaptation to a site, and serving."""

from importlib.metadata import version

from resight.arrays import cosine_similarity
from resight.bundle.bundle import open_bundle
from resight.bundle.manifest import Manifest
from resight.errors import ReIDError
from resight.image import ImageSpec

__version__ = version("resight")
__all__ = ["ImageSpec", "Manifest", "ReIDError", "__version__", "cosine_similarity", "open_bundle"]
