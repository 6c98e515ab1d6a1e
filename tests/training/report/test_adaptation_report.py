"""The adaptation report of a finished run: examples selected by change, hits labelled by the truth."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import random_encoder, without_persons, write_random_checkpoint

from resight.demo.harness import ServedResult
from resight.encoder.checkpoint import Checkpoint, Provenance, load_checkpoint
from resight.errors import TrainingError
from resight.exporters.export import export_encoder
from resight.metrics.ranking import score_rankings
from resight.training.evaluation.evaluate import evaluation_splits
from resight.training.features.extract import extract_features
from resight.training.report.adaptation import (
    DemoResult,
    adaptation_report,
    demo_report,
    render,
    write_adaptation_report,
)
from resight.training.report.page import Thumbnails
from resight.training.report.ranked_lists import EXAMPLES, HITS, rank_gallery, ranked_lists
from resight.training.store.crops import UNKNOWN
from resight.training.store.datasets import Site

pytestmark = pytest.mark.long

HISTORY = (
    {"stage": "teacher", "epoch": 0, "loss": 3.0, "contrast": 3.0, "guidance": 0.0, "clusters": 9.0, "label_s": 1.0},
    {"stage": "student", "epoch": 0, "loss": 2.0, "contrast": 1.5, "guidance": 0.5, "clusters": 8.0, "label_s": 1.0},
)


def random_results(site: Site, seed: int) -> ServedResult:
    """Random rankings."""
    query, gallery = evaluation_splits(site)
    rng = np.random.default_rng(seed)
    rankings = [rng.permutation(len(gallery)).tolist() for _ in range(len(query))]
    similarities = [np.sort(rng.uniform(-1, 1, len(gallery)))[::-1].tolist() for _ in rankings]
    score = score_rankings(rankings, query.persons, gallery.persons, query.cameras, gallery.cameras)
    return ServedResult(score, rankings, similarities)


def labels_of(outcome: DemoResult) -> np.ndarray:
    return np.asarray(np.load(outcome.log / "student-labels.npy"))


@pytest.fixture(scope="module")
def outcome(tiny_site: Site, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    folder = tmp_path_factory.mktemp("story")
    bundle = export_encoder(random_encoder(), folder / "b", name="random", training={}, weights_licence="none")
    encoder = load_checkpoint(write_random_checkpoint(folder / "model")).encoder
    provenance = Provenance({"name": "purify"}, "student", 0, "f", {"licence": "none"}, HISTORY)
    labels = np.where(np.arange(len(tiny_site.train)) % 7 == 0, -1, tiny_site.train.persons - 1)
    (folder / "log").mkdir()
    np.save(folder / "log" / "student-labels.npy", labels)
    return DemoResult(
        site=tiny_site,
        store=tiny_site.train,
        checkpoint=Checkpoint(encoder, provenance),
        features=extract_features(encoder, tiny_site.train, local=False)[0],
        bundle=bundle,
        before=random_results(tiny_site, 1),
        after=random_results(tiny_site, 2),
        log=folder / "log",
        figures={"initial": {"mAP": 20.0, "rank1": 30.0}, "adapted": {"mAP": 31.5, "rank1": 40.0}},
        seconds={"adapt": 3.0},
    )


def test_the_report_has_the_epochs_and_the_gain_of_the_run(outcome: DemoResult) -> None:
    report = demo_report(outcome)
    assert "+11.5" in report.summary
    assert [(row.stage, row.epoch) for row in report.epochs] == [("teacher", 0), ("student", 0)]
    assert report.epochs[0].figures == {"loss": 3.0, "contrast": 3.0, "clusters": 9.0, "label_s": 1.0}
    assert report.epochs[1].figures["guidance"] == 0.5
    assert report.seconds == {"adapt": 3.0}


def test_the_demo_has_every_part_of_an_adaptation_and_more(outcome: DemoResult) -> None:
    alone = adaptation_report(outcome.store, outcome.checkpoint, labels_of(outcome), outcome.features, title="alone")
    demo = demo_report(outcome)
    assert [group.title for group in alone.clusters] == [group.title for group in demo.clusters]
    assert alone.map is not None and demo.map is not None
    assert np.array_equal(alone.map.places, demo.map.places)
    assert set(alone.model) < set(demo.model) and alone.config == demo.config
    assert alone.seconds == {"teacher: labelling": 1.0, "student: labelling": 1.0}
    assert "240 unlabelled crops from 3 cameras" in alone.summary and alone.notes == []


def test_a_page_is_written_without_labels_cameras_clusters_or_crops(outcome: DemoResult) -> None:
    bare = without_persons(outcome.store)
    bare = replace(bare, cameras=np.zeros(len(bare), np.int64), camera_names=("door",), root=bare.root / "gone")
    labels = labels_of(outcome)
    for known in (labels, np.full(len(bare), -1), np.zeros(len(bare), np.int64)):
        report = adaptation_report(bare, outcome.checkpoint, known, outcome.features, title="bare")
        page = render(report)
        assert "purity" not in page.replace("Purity", "") and "data:image" not in page
        assert any("one camera" in note for note in report.notes)
        assert any("cannot be read" in note for note in report.notes) == bool((known >= 0).any())
    nothing = adaptation_report(bare.subset([]), outcome.checkpoint, labels[:0], outcome.features[:0], title="nothing")
    assert "0 unlabelled crops from 0 cameras" in render(nothing)


def test_one_call_writes_a_page(outcome: DemoResult, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done: list[int] = []
    write_adaptation_report(page, outcome.store, outcome.checkpoint, outcome.log, title="site", progress=done.append)
    assert sum(done) == len(outcome.store)
    text = page.read_text()
    assert text.count("data:image/jpeg") > 50 and 'id="map"' in text and 'id="scores"' not in text
    assert not re.search(r"<script|@import|https?://", text)


def test_a_missing_log_or_one_of_other_crops_is_rejected(outcome: DemoResult, tmp_path: Path) -> None:
    def write(log: Path) -> None:
        write_adaptation_report(tmp_path / "r.html", outcome.store, outcome.checkpoint, log, title="site")

    with pytest.raises(TrainingError, match=r"student-labels\.npy cannot be read"):
        write(tmp_path)
    np.save(tmp_path / "student-labels.npy", np.zeros(3))
    with pytest.raises(TrainingError, match="float64"):
        write(tmp_path)
    np.save(tmp_path / "student-labels.npy", np.zeros(3, np.int64))
    with pytest.raises(TrainingError, match="3 crops and the store has 240"):
        write(tmp_path)
    assert not (tmp_path / "r.html").exists()


def test_ranked_lists_are_ordered_by_gain_and_labelled_by_the_truth(outcome: DemoResult) -> None:
    query, gallery = evaluation_splits(outcome.site)
    row_of = {query.read(row): row for row in range(len(query))}
    shown = demo_report(outcome).ranked
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


def test_ranking_from_features_equals_the_full_sort(outcome: DemoResult) -> None:
    query, gallery = evaluation_splits(outcome.site)
    encoder = outcome.checkpoint.encoder
    queries, known = (extract_features(encoder, store, local=False)[0] for store in (query, gallery))
    found = rank_gallery(query, gallery, queries, known)
    order = np.argsort(-(queries @ known.T), axis=1, kind="stable")
    full = score_rankings(order.tolist(), query.persons, gallery.persons, query.cameras, gallery.cameras)
    assert found.score.mAP == pytest.approx(full.mAP, abs=1e-9)
    for row, (rows, cosines) in enumerate(zip(found.rankings, found.similarities, strict=True)):
        np.testing.assert_allclose(cosines, np.sort(known @ queries[row])[::-1][:HITS], atol=1e-6)
        np.testing.assert_allclose(known[rows] @ queries[row], cosines, atol=1e-6)


def test_unknown_hits_are_junk_and_damaged_ones_are_omitted(outcome: DemoResult, tmp_path: Path) -> None:
    query, gallery = evaluation_splits(outcome.site)
    shutil.copytree(gallery.root, tmp_path / "site")
    persons = gallery.persons.copy()
    first = outcome.after.rankings[0]
    persons[first[1]] = UNKNOWN
    gallery = replace(gallery, root=tmp_path / "site", persons=persons)
    (gallery.root / gallery.paths[first[0]]).unlink()
    score = replace(outcome.after.score, average_precision=np.eye(1, len(query))[0])
    thumbnails = Thumbnails()
    [shown, *_] = ranked_lists(query, gallery, outcome.before, replace(outcome.after, score=score), thumbnails)
    assert shown.query.image == query.read(0)
    assert len(shown.after) == HITS - 1 and shown.after[0].verdict == "junk"
    assert "cannot be read" in thumbnails.notes[0]
