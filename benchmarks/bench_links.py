"""What confirmed and rejected pairs bring to the labels of an adaptation: agreement with the truth by number of links.

An operator looks at the best hit of other cameras of some crops, taken by chance, and confirms or rejects it: the truth
answers here. Clusters of the start's features with and without those links, eps chosen without labels each time; and
how long links take.

    python benchmarks/bench_links.py --site market-subset --init osnet_x0_25_msmt17.pth [--people 200] [--seeds 3]

A minute or two on two cores, most of it for the features.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from resight.encoder.weights import load_weights
from resight.training.clustering.cluster import Clustering, ClusterSettings, cluster
from resight.training.features.extract import extract_features
from resight.training.store.crops import CropStore
from resight.training.store.datasets import open_site
from resight.training.store.links import Links

LINKS = (0, 50, 100, 200, 500, 1000)
SETTINGS = ClusterSettings(centre_cameras=True)  # as purify-camera's


def answered(features: NDArray[np.float32], store: CropStore, count: int, seed: int) -> Links:
    """Best hits of other cameras, of some crops by chance, with the truth's verdict."""
    asked = np.random.default_rng(seed).permutation(len(store))[:count]
    similarity = features[asked] @ features.T
    similarity[store.cameras[asked, None] == store.cameras] = -2
    pairs = sorted({(min(row, hit), max(row, hit)) for row, hit in zip(asked, similarity.argmax(1), strict=True)})
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    return Links(rows, store.persons[rows[:, 0]] == store.persons[rows[:, 1]])


def agreement(found: Clustering, store: CropStore) -> float:
    """ARI with the truth, outliers as clusters of one."""
    alone = found.labels < 0
    labels = np.where(alone, found.count + np.cumsum(alone), found.labels)
    return float(adjusted_rand_score(store.persons, labels))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, help="Market-1501 folder")
    parser.add_argument("--init", default="builtin")
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    if asked.site is None:
        print("not run: give --site, a Market-1501 folder")
        return
    store = open_site(asked.site).train
    store = store.subset(np.flatnonzero(np.isin(store.persons, np.unique(store.persons)[: asked.people])))
    features = extract_features(load_weights(asked.init).encoder, store, device="cpu", local=False)[0]
    print(f"{len(store)} crops of {asked.people} people\n")
    print("| links | of them rejected | violated without | clusters | ARI | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in LINKS:
        rows = []
        for seed in range(asked.seeds):
            links = answered(features, store, count, seed)
            began = time.perf_counter()
            found = cluster([features], SETTINGS, cameras=store.cameras, links=links)
            seconds = time.perf_counter() - began
            figures = (
                len(links),
                (~links.same).sum(),
                found.links_violated,
                found.count,
                agreement(found, store),
                seconds,
            )
            rows.append(figures)
        used, rejected, violated, clusters, ari, seconds = np.mean(rows, 0)
        print(f"| {used:.0f} | {rejected:.0f} | {violated:.0f} | {clusters:.0f} | {ari:.3f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
