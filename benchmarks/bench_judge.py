"""How well the judge's figures, none of which reads a label, put models into the order of their true mAP.

Models are the weights given, the checkpoints given, and variants made of both: noise on the weights, and weights
between those and each checkpoint of the same shape. All are judged on the query and gallery crops of a Market-1501
folder, whom no adaptation has seen, with the tracks a perfect tracker would give; mAP is measured on the same crops.

    python benchmarks/bench_judge.py --site market/ --weights osnet.pth --checkpoints a/ b/ --cache features/
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from resight.arrays import Floats
from resight.encoder.model import Encoder
from resight.encoder.weights import load_weights
from resight.metrics.ranking import evaluate_ranking
from resight.training.adaptation.recipe import load_recipe
from resight.training.clustering.cluster import Clustering, try_cluster
from resight.training.evaluation.evaluate import evaluation_splits
from resight.training.features.extract import extract_features
from resight.training.judging.judge import judge
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site, join_splits, open_site

NOISE = (0.1, 0.2, 0.3, 0.5)  # of each tensor's standard deviation


def noisy(encoder: Encoder, level: float) -> Encoder:
    """The encoder with noise on all but its norms, as much as ``level`` times each tensor's standard deviation."""
    made, rng = copy.deepcopy(encoder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in made.parameters():
            if tensor.ndim > 1:
                tensor += level * tensor.std() * torch.randn(tensor.shape, generator=rng)
    return made


def between(one: Encoder, other: Encoder, share: float) -> Encoder:
    """Weights and norms' statistics ``share`` of the way from one to the other."""
    made, target = copy.deepcopy(one), other.state_dict()
    state = {
        name: tensor + share * (target[name] - tensor) if tensor.is_floating_point() else tensor
        for name, tensor in one.state_dict().items()
    }
    made.load_state_dict(state)
    return made


def models(weights: list[str], checkpoints: list[str]) -> Iterator[tuple[str, Encoder]]:
    """Every model with its name."""
    given = {Path(name).name: load_weights(name).encoder.eval() for name in weights}
    adapted = {Path(name).name: load_weights(name).encoder.eval() for name in checkpoints}
    yield from given.items()
    yield from adapted.items()
    for name, encoder in given.items():
        shapes = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
        for other, target in adapted.items():
            same = shapes == {key: tensor.shape for key, tensor in target.state_dict().items()}
            if same and encoder.config.image == target.config.image:
                yield f"half of {name} and {other}", between(encoder, target, 0.5)
        for level in NOISE:
            yield f"{name}, noise {level:g}", noisy(encoder, level)


def features_of(name: str, encoder: Encoder, store: CropStore, cache: Path | None) -> Floats:
    """Features of the crops, from the cache where they are there."""
    file = None if cache is None else cache / f"{name.replace('/', '_')}.npy"
    if file is not None and file.is_file():
        found: Floats = np.load(file)
        return found
    found = extract_features(encoder, store, local=False)[0]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, found)
    return found


def figures(features: Floats, store: CropStore, site: Site) -> dict[str, float]:
    """MAP by labels, and every figure of the judge that can be had."""
    query, gallery = evaluation_splits(site)
    row = {path: number for number, path in enumerate(store.paths)}
    parts = [features[[row[path] for path in part.paths]] for part in (query, gallery)]
    score = evaluate_ranking(*parts, query.persons, gallery.persons, query.cameras, gallery.cameras)
    clustering = try_cluster(features, store, load_recipe("purify-camera").cluster)
    judged = judge(features, store, clustering=clustering)
    found = {"mAP": 100 * score.mAP, "score": np.nan if judged.score is None else judged.score}
    found |= {name: one.value for name, one in judged.separation.figures.items()}
    found |= {name: one.value for name, one in judged.searches.figures.items()}
    if isinstance(clustering, Clustering) and judged.clusters and judged.clusters.cameras:
        mix, kept = judged.clusters.cameras, judged.clusters.tracks
        found["silhouette"] = judged.clusters.silhouette or np.nan
        found["camera mix"] = mix.cameras_per_cluster / mix.chance_cameras_per_cluster
        found["tracks whole"] = np.nan if kept.whole_share is None else kept.whole_share
        found["inliers"] = 1 - judged.clusters.outlier_share
    return found | {"variance": judged.variance or np.nan}


def show(found: dict[str, dict[str, float]]) -> None:
    """A line for each model, best mAP first, then how each figure ranks them."""
    names = list(next(iter(found.values())))
    print("| model | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for model, row in sorted(found.items(), key=lambda item: -item[1]["mAP"]):
        cells = (f"{row[name]:.1f}" if name == "mAP" else f"{row.get(name, np.nan):.3f}" for name in names)
        print(f"| {model} | " + " | ".join(cells) + " |")
    print(f"\nSpearman's correlation with mAP over {len(found)} models:")
    for name in names[1:]:
        pairs = [(row["mAP"], row[name]) for row in found.values() if np.isfinite(row.get(name, np.nan))]
        print(f"  {name}: {spearmanr(*zip(*pairs, strict=True)).statistic:.3f} over {len(pairs)}")


def main() -> None:
    """Measure every model for which there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, help="Market-1501 folder with query and gallery")
    parser.add_argument("--weights", nargs="+", default=["builtin"], help="initial weights, of which variants are made")
    parser.add_argument("--checkpoints", nargs="*", default=[], help="adapted models")
    parser.add_argument("--cache", type=Path, help="folder that keeps features from run to run")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no further model after this time")
    arguments = parser.parse_args()
    if arguments.site is None:
        print("not run: give --site, a Market-1501 folder with query and gallery")
        return
    site = open_site(arguments.site, tracks_from_names=True)
    assert site.gallery is not None, "evaluation_splits refuses what has no gallery"
    store = join_splits(replace(site, train=site.gallery))
    found, start = {}, time.monotonic()
    for name, encoder in models(arguments.weights, arguments.checkpoints):
        if time.monotonic() - start > arguments.seconds:
            break
        found[name] = figures(features_of(name, encoder, store, arguments.cache), store, site)
        print(f"{time.monotonic() - start:.0f} s: {name}", flush=True)
    show(found)


if __name__ == "__main__":
    main()
