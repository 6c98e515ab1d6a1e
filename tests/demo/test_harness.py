"""Features and scores from a running service equal those computed offline."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import random_encoder

from resight.bundle.bundle import Bundle
from resight.client import Client
from resight.demo import harness
from resight.errors import SiteError, UnavailableError
from resight.exporters.export import export_encoder
from resight.image import decode, fit
from resight.runtime.onnx import OnnxRuntime
from resight.training.evaluation.evaluate import evaluate_site, evaluation_splits, percentages
from resight.training.features.extract import extract_features
from resight.training.store.datasets import Site, open_site

pytestmark = pytest.mark.long


def ignore(done: int) -> None:
    """Ignore progress."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("served") / "bundle"
    return export_encoder(random_encoder(), path, name="random", training={}, weights_licence="none")


def pid_of(data: Path) -> int:
    return int(json.loads((data / "server.json").read_text())["pid"])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_served_features_and_scores_equal_those_computed_offline(
    bundle: Bundle, tiny_site: Site, tmp_path: Path
) -> None:
    query, gallery = evaluation_splits(tiny_site)
    with harness.running_server(bundle.path, tmp_path / "data", max_top_k=len(gallery)) as address:
        pid = pid_of(tmp_path / "data")
        assert is_running(pid)
        with Client(address) as client:
            crops = [query.read(row) for row in range(len(query))]
            batch = client.embed_batch(crops)
            alone = client.embed(crops[0])
        harness.enrol_gallery(address, gallery, ignore)
        found = harness.search_gallery(address, query, gallery, ignore)
    assert not is_running(pid)

    encoder = random_encoder()
    offline = extract_features(encoder, query, local=False)[0]
    served = np.stack(batch)
    assert (served * offline).sum(1).min() >= 0.9999
    assert alone @ offline[0] >= 0.9999
    exported = OnnxRuntime(bundle).embed(np.stack([fit(decode(crop), bundle.manifest.image) for crop in crops]))
    assert (served * exported).sum(1).min() >= 0.9999

    score = percentages(evaluate_site(tiny_site, lambda store: extract_features(encoder, store, local=False)[0]))
    assert 0 < score["mAP"] < 100
    for name, value in percentages(found.score).items():
        assert value == pytest.approx(score[name], abs=0.1 if name == "mAP" else 100 / len(query)), name

    rows, similarities = found.rankings[0], found.similarities[0]
    assert sorted(rows) == list(range(len(gallery)))
    assert similarities == sorted(similarities, reverse=True)
    by_hand = extract_features(encoder, gallery, local=False)[0][rows] @ offline[0]
    assert np.allclose(similarities, by_hand, atol=1e-4)


def test_a_server_that_cannot_start_is_reported_with_its_log(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / "model.onnx").read_bytes())
    data[100] ^= 1
    (tmp_path / "damaged" / "model.onnx").write_bytes(data)
    with (
        pytest.raises(UnavailableError, match=r"exited with status 1:[\s\S]*error:[\s\S]*SHA-256"),
        harness.running_server(tmp_path / "damaged", tmp_path / "data", max_top_k=10),
    ):
        raise AssertionError("unreachable: the server must not start")


def test_the_server_stops_when_the_work_fails(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(KeyError), harness.running_server(bundle.path, tmp_path / "data", max_top_k=10):
        pid = pid_of(tmp_path / "data")
        raise KeyError
    assert not is_running(pid)


def test_a_killed_server_is_reported_and_its_address_not_reused(bundle: Bundle, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with (
        pytest.raises(UnavailableError, match=r"exited with status -9 instead of 0"),
        harness.running_server(bundle.path, data, max_top_k=10) as first,
    ):
        os.kill(pid_of(data), signal.SIGKILL)
    assert (data / "server.json").exists()  # the killed server could not remove it
    with harness.running_server(bundle.path, data, max_top_k=10) as second, Client(second) as client:
        assert second != first
        assert client.info().model == "random"


def test_crops_that_the_server_rejects_are_named(bundle: Bundle, tiny_site: Site, tmp_path: Path) -> None:
    shutil.copytree(tiny_site.root, tmp_path / "site")
    query, gallery = evaluation_splits(open_site(tmp_path / "site"))
    for store in (query, gallery):
        (store.root / store.paths[7]).write_text("no image")
    with harness.running_server(bundle.path, tmp_path / "data", max_top_k=100) as address:
        with pytest.raises(SiteError, match=rf"{gallery.paths[7]} cannot be enrolled: .*JPEG"):
            harness.enrol_gallery(address, gallery, ignore)
        with pytest.raises(SiteError, match=rf"{query.paths[7]} cannot be searched for: .*JPEG"):
            harness.search_gallery(address, query, gallery, ignore)
