"""Comparison of two bundles: their manifests field by field, and their features of the same golden pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Pixels
from resight.bundle.bundle import Bundle
from resight.bundle.manifest import to_json

EmbedPrecision = Callable[[Bundle, str, Pixels], NDArray[np.float32]]
"""A bundle, one of its precisions and uint8 (P, H, W, 3) -> float32 (P, D) unit rows."""

IGNORED_FIELDS = ("manifest_sha256",)  # differs whenever any other field does


@dataclass(frozen=True)
class ProbeComparison:
    """The differences between two bundles' features of the same P images.

    Attributes:
        precision: of both graphs.
        probes: P.
        mean_cosine: mean cosine between the two features of a probe; None if their lengths differ. Only meaningful
            within one space: two spaces may be rotations of each other and still be equivalent.
        min_cosine: the smallest of these cosines.
        mean_similarity_change: mean absolute change of the P (P - 1) / 2 similarities between probes, which a rotation
            does not affect. 0 for a single probe.
        max_similarity_change: the largest of these changes.
    """

    precision: str
    probes: int
    mean_cosine: float | None
    min_cosine: float | None
    mean_similarity_change: float
    max_similarity_change: float


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries and lists to one dictionary: ``{"a": {"b": [7]}, "c": {}}`` -> ``{"a.b.0": 7}``."""
    return dict(_leaves(value, path))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def describe(bundle: Bundle) -> dict[str, Any]:
    """The manifest as plain values, artefacts by file name and each with its size in bytes."""
    body: dict[str, Any] = json.loads(to_json(bundle.manifest))
    for name in IGNORED_FIELDS:
        del body[name]
    body["artefacts"] = {
        entry.pop("file"): entry | {"bytes": (bundle.path / file).stat().st_size}
        for entry in body["artefacts"]
        for file in [entry["file"]]
    }
    return body


def differing_fields(first: Bundle, second: Bundle) -> dict[str, tuple[Any, Any]]:
    """Every field that differs between the manifests, in alphabetical order; None if one lacks it."""
    one, other = flatten(describe(first)), flatten(describe(second))
    return {
        path: (one.get(path), other.get(path))
        for path in sorted(one.keys() | other.keys())
        if one.get(path) != other.get(path)
    }


def shared_pixels(first: Bundle, second: Bundle) -> Pixels:
    """Golden pixels that are in both bundles, uint8 (P, H, W, 3); P = 0 if their image specs differ.

    Raises:
        BundleError: a bundle's probes are damaged.
    """
    mine, theirs = first.probes().pixels, second.probes().pixels
    if first.manifest.image != second.manifest.image:
        return mine[:0]
    known = {image.tobytes() for image in theirs}
    return mine[[image.tobytes() in known for image in mine]]


def compare_probes(first: Bundle, second: Bundle, embed: EmbedPrecision) -> list[ProbeComparison]:
    """Compare features of the shared pixels in each precision that both bundles have.

    Raises:
        BundleError: a graph or the probes are rejected.
    """
    pixels = shared_pixels(first, second)
    if not len(pixels):
        return []
    mine, theirs = ([a.precision for a in b.manifest.artefacts if a.runtime == "onnx"] for b in (first, second))
    return [
        compare_features(precision, embed(first, precision, pixels), embed(second, precision, pixels))
        for precision in mine
        if precision in theirs
    ]


def compare_features(precision: str, first: NDArray[np.float32], second: NDArray[np.float32]) -> ProbeComparison:
    """Compare features of the same images, row by row and by the similarities between the rows.

    Args:
        precision: of both graphs.
        first: float32 (P, D) unit rows.
        second: float32 (P, E) unit rows.
    """
    one, other = first.astype(np.float64), second.astype(np.float64)
    cosines = (one * other).sum(1) if one.shape == other.shape else None
    pairs = np.triu_indices(len(one), 1)
    change = np.abs((one @ one.T)[pairs] - (other @ other.T)[pairs])  # (P (P - 1) / 2,)
    return ProbeComparison(
        precision,
        len(one),
        None if cosines is None else float(cosines.mean()),
        None if cosines is None else float(cosines.min()),
        float(change.mean()) if change.size else 0.0,
        float(change.max(initial=0.0)),
    )
