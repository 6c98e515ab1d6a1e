"""What the report is told of a finished run: examples chosen by what changed, hits judged by the site's truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import random_encoder, write_random_checkpoint

from resight.checkpoint import Checkpoint, Provenance, load_checkpoint
from resight.exporters.export import export_encoder
from resight.ranking import score_rankings
from resight.served import Served
from resight.training.datasets import Site
from resight.training.evaluate import evaluation_splits
from resight.training.story import EXAMPLES, HITS, Outcome, tell

HISTORY = (
    {"stage": "teacher", "epoch": 0, "loss": 3.0, "contrast": 3.0, "guidance": 0.0, "clusters": 9.0, "label_s": 1.0},
    {"stage": "student", "epoch": 0, "loss": 2.0, "contrast": 1.5, "guidance": 0.5, "clusters": 8.0, "label_s": 1.0},
)


def answers(site: Site, seed: int) -> Served:
    """Rankings by chance."""
    query, gallery = evaluation_splits(site)
    rng = np.random.default_rng(seed)
    rankings = [rng.permutation(len(gallery)).tolist() for _ in range(len(query))]
    similarities = [np.sort(rng.uniform(-1, 1, len(gallery)))[::-1].tolist() for _ in rankings]
    score = score_rankings(rankings, query.persons, gallery.persons, query.cameras, gallery.cameras)
    return Served(score, rankings, similarities)


@pytest.fixture(scope="module")
def outcome(tiny_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("story")
    bundle = export_encoder(random_encoder(), folder / "b", name="random", training={}, weights_licence="none")
    encoder = load_checkpoint(write_random_checkpoint(folder / "model")).encoder
    provenance = Provenance({"name": "purify"}, "student", 0, "f", {"licence": "none"}, HISTORY)
    labels = np.where(np.arange(len(tiny_site.train)) % 7 == 0, -1, tiny_site.train.persons - 1)
    (folder / "log").mkdir()
    np.save(folder / "log" / "student-labels.npy", labels)
    return Outcome(
        site=tiny_site,
        store=tiny_site.train,
        checkpoint=Checkpoint(encoder, provenance),
        bundle=bundle,
        before=answers(tiny_site, 1),
        after=answers(tiny_site, 2),
        log=folder / "log",
        figures={"initial": {"mAP": 20.0, "rank1": 30.0}, "adapted": {"mAP": 31.5, "rank1": 40.0}},
        seconds={"adapt": 3.0},
    )


def test_epochs_and_gain_are_those_of_the_run(outcome: Outcome) -> None:
    report = tell(outcome)
    assert "+11.5" in report.summary
    assert [(row.stage, row.epoch, row.clusters) for row in report.epochs] == [("teacher", 0, 9), ("student", 0, 8)]
    assert set(report.epochs[0].loss) == {"loss", "contrast"}  # a teacher has no guidance
    assert report.epochs[1].loss == {"loss": 2.0, "contrast": 1.5, "guidance": 0.5}


def test_clusters_show_crops_of_their_own_label(outcome: Outcome) -> None:
    store, report = outcome.store, tell(outcome)
    labels = np.load(Path(outcome.log) / "student-labels.npy")
    sizes = [cluster.size for cluster in report.clusters]
    assert sizes == sorted(sizes, reverse=True) and len(report.clusters) == 8
    for cluster in report.clusters:
        rows = np.flatnonzero(labels == cluster.label)
        assert cluster.size == len(rows) and cluster.purity == 1.0
        assert {crop.image for crop in cluster.crops} <= {store.read(int(row)) for row in rows}


def test_ranked_lists_are_the_most_helped_first_and_judged_by_truth(outcome: Outcome) -> None:
    query, gallery = evaluation_splits(outcome.site)
    row_of = {query.read(row): row for row in range(len(query))}
    shown = tell(outcome).ranked
    assert len(shown) == EXAMPLES
    gains = outcome.after.score.average_precision - outcome.before.score.average_precision
    chosen = [row_of[ranked.query.image] for ranked in shown]
    assert gains[chosen[0]] == gains.max() and gains[chosen[-1]] == gains.min()
    for row, ranked in zip(chosen, shown, strict=True):
        for hits, served in ((ranked.before, outcome.before), (ranked.after, outcome.after)):
            assert [hit.image for hit in hits] == [gallery.read(found) for found in served.rankings[row][:HITS]]
            for hit, found in zip(hits, served.rankings[row], strict=False):
                same = gallery.persons[found] == query.persons[row]
                near = gallery.cameras[found] == query.cameras[row]
                assert hit.verdict == ("wrong" if not same else "junk" if near else "right")
