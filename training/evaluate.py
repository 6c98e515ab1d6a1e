"""A labelled site's query and gallery through a model: every figure of docs/evaluation.md.

Letters: N crops, B batch, D feature size, Q queries, G gallery rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from resight.camera_pairs import CameraPairs, evaluate_camera_pairs
from resight.errors import InputError, SiteError
from resight.image import ImageSpec, Pixels
from resight.model import Encoder
from resight.openset import OpenSetScore, evaluate_open_set
from resight.ranking import RankingScore, cosine_rows, evaluate_ranking, evaluate_rows, truth_of
from resight.training.crops import CropStore
from resight.training.datasets import Site
from resight.training.features import EXTRACTION_BATCH, read_batches, to_input
from resight.training.neighbours import Floats
from resight.training.rerank import rerank

RANKS = (1, 5, 10)  # the ranks papers print


@dataclass(frozen=True, eq=False)
class SiteScore:
    """What `measure_site` found.

    Attributes:
        ranking: closed set; by re-ranked distance where that was asked for.
        pairs: the same for each pair of cameras.
        open_set: by cosine similarity always: a service has no re-ranked distance to hold a threshold against.
            None where ``reservation`` says why.
        reservation: why there are no open-set figures; empty where there are.
        camera_names: what the cameras of ``pairs`` are called.
        queries: Q.
        gallery: G.
    """

    ranking: RankingScore
    pairs: CameraPairs
    open_set: OpenSetScore | None
    reservation: str
    camera_names: tuple[str, ...]
    queries: int
    gallery: int


def evaluate_site(site: Site, embed: Callable[[CropStore], Floats]) -> RankingScore:
    """Rank a site's gallery for each of its queries.

    Args:
        site: with a query and a gallery split.
        embed: crops of a store -> float32 (N, D), unit rows.

    Raises:
        SiteError: the site has no query and gallery.
        InputError: no query has a match in another camera.
    """
    query, gallery = evaluation_splits(site)
    return evaluate_ranking(
        embed(query), embed(gallery), query.persons, gallery.persons, query.cameras, gallery.cameras
    )


def measure_site(
    site: Site, embed: Callable[[CropStore], Floats], *, reranked: bool = False, device: str = "cpu"
) -> SiteScore:
    """Closed-set, open-set and camera-pair figures of a site.

    Args:
        site: with a query and a gallery split.
        embed: crops of a store -> float32 (N, D), unit rows.
        reranked: whether k-reciprocal re-ranking makes the closed-set lists.
        device: where re-ranking searches neighbours.

    Raises:
        SiteError: the site has no query and gallery.
        InputError: no query has a match in another camera.
    """
    query, gallery = evaluation_splits(site)
    truth = truth_of(query.persons, gallery.persons, query.cameras, gallery.cameras)
    features = embed(query), embed(gallery)
    cosine = cosine_rows(*features, truth)
    ranked_by = rerank(*features, device=device).rows if reranked else cosine
    ranking = evaluate_rows(ranked_by, truth)
    open_set, reservation = None, ""
    try:
        open_set = evaluate_open_set(cosine, truth)
    except InputError as error:
        reservation = str(error)
    pairs = evaluate_camera_pairs(ranked_by, truth)
    return SiteScore(ranking, pairs, open_set, reservation, query.camera_names, len(query), len(gallery))


def embed_store(store: CropStore, spec: ImageSpec, embed: Callable[[Pixels], Floats], *, flip: bool = False) -> Floats:
    """Features of every crop of a store.

    Args:
        store: N crops.
        spec: the size the model wants.
        embed: uint8 (B, H, W, 3) -> float32 (B, D), unit rows.
        flip: whether each feature is the mean of the crop's and its mirror image's, made length 1.

    Returns:
        float32 (N, D), unit rows.

    Raises:
        ImageError: a crop cannot be decoded, with its path.
    """
    batches = np.array_split(np.arange(len(store)), max(1, -(-len(store) // EXTRACTION_BATCH)))
    done = []
    for _, pixels in read_batches(store, batches, spec):
        features = embed(pixels)
        if flip:
            both = features + embed(np.ascontiguousarray(pixels[:, :, ::-1]))
            features = both / np.linalg.norm(both, axis=1, keepdims=True)
        done.append(features)
    return np.concatenate(done)


def encoder_embedding(encoder: Encoder, device: str) -> Callable[[Pixels], Floats]:
    """An encoder as `embed_store` wants it, in eval mode and in float32.

    Args:
        encoder: on ``device``.
        device: where it computes.
    """
    encoder.eval()

    def embed(pixels: Pixels) -> Floats:
        with torch.inference_mode():
            features: Floats = encoder.embed(to_input(encoder, pixels, device)).cpu().numpy()
        return features

    return embed


def evaluation_splits(site: Site) -> tuple[CropStore, CropStore]:
    """Query and gallery of a site.

    Raises:
        SiteError: it has none, because nobody said who is on its crops, or one camera saw everybody.
    """
    if site.query is None or site.gallery is None:
        raise SiteError(
            f"{site.root} has no query and gallery: measuring needs known persons seen by two cameras or more, in a "
            "Market-1501 folder, a crop store with splits, or folders <camera>/<person>/; to adapt without them "
            "use `resight adapt`"
        )
    if len(np.unique(np.concatenate([site.query.cameras, site.gallery.cameras]))) < 2:
        raise SiteError(
            f"all query and gallery crops of {site.root} are from one camera: measuring counts matches seen by another "
            "camera and needs two or more; to adapt to one camera use `resight adapt`"
        )
    return site.query, site.gallery


def percentages(score: RankingScore) -> dict[str, float]:
    """The figures papers print, in percent, rounded to hundredths."""
    ranks = {f"rank{r}": score.rank(r) for r in RANKS}
    return {name: round(100 * value, 2) for name, value in {"mAP": score.mAP, **ranks, "mINP": score.mINP}.items()}
