"""The output of `--json` and `--plot`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resight.errors import InputError
from resight.metrics.open_set import evaluate_open_set
from resight.metrics.ranking import GroundTruth, cosine_rows, evaluate_camera_pairs, evaluate_rows
from resight.training.evaluation.evaluate import SiteScore, score_to_json
from resight.training.evaluation.plots import check_plot_path, draw_evaluation


@pytest.fixture(scope="module")
def score() -> SiteScore:
    """Forty people, 150 queries, three cameras of which one has no query, and distractors."""
    rng = np.random.default_rng(8)
    persons = rng.integers(1, 41, 150), rng.integers(0, 41, 400)
    truth = GroundTruth(*persons, rng.integers(0, 2, 150), rng.integers(0, 3, 400))
    centres = rng.standard_normal((41, 24))
    sides = []
    for side in persons:
        rows = centres[side] + 0.9 * rng.standard_normal((len(side), 24))
        sides.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    rows = cosine_rows(sides[0], sides[1], truth)
    pairs, open_set = evaluate_camera_pairs(rows, truth), evaluate_open_set(rows, truth)
    return SiteScore(evaluate_rows(rows, truth), pairs, open_set, "", ("yard", "hall", "gate"), 150, 400)


def test_json_has_every_metric_in_percent(score: SiteScore) -> None:
    values = json.loads(json.dumps(score_to_json(score), allow_nan=False))
    assert list(values)[:6] == ["mAP", "rank1", "rank5", "rank10", "mINP", "valid_queries"]
    assert values["mAP"] == pytest.approx(100 * score.ranking.mAP, abs=0.0051)
    assert len(values["cmc"]) == 50 and values["cmc"][0] == values["rank1"] and values["cmc"][9] == values["rank10"]
    assert (values["queries"], values["gallery"], values["open_set_reservation"]) == (150, 400, "")
    pairs = values["camera_pairs"]
    assert [(pair["query_camera"], pair["gallery_camera"]) for pair in pairs] == [
        (a, b) for a in ("yard", "hall") for b in ("yard", "hall", "gate")
    ]
    assert (pairs[0]["mAP"], pairs[0]["rank1"], pairs[0]["valid_queries"]) == (None, None, 0)
    assert pairs[2]["mAP"] == pytest.approx(100 * score.pairs.mAP[0, 2], abs=0.0051)


def test_the_guide_documents_every_key(score: SiteScore) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/evaluation.md").read_text().split("## `--json`")[1]
    values = score_to_json(score)
    keys = {*values, *(f"open_set.{key}" for key in values["open_set"]), "settings", "flip", "rerank"}
    keys |= {*values["open_set"]["operating_points"][0], *values["open_set"]["curve"][0], *values["camera_pairs"][0]}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_json_of_the_open_set(score: SiteScore) -> None:
    values, found = score_to_json(score)["open_set"], score.open_set
    assert found is not None
    assert values["nonmated_searches"] == 150 and sum(values["enrolled_persons"]) == 40
    one, ten = values["operating_points"]
    assert (one["target"], ten["target"], one["false_positives"]) == (1.0, 10.0, 1)
    assert one["reservation"] and ten["false_positives"] <= 15
    assert ten["fpir"] == pytest.approx(100 * found.fpir(ten["threshold"]), abs=0.0051)
    assert ten["tpir_rank1"] == pytest.approx(100 - 100 * found.fnir(ten["threshold"], 1), abs=0.0051)
    assert one["tpir_rank1"] <= ten["tpir_rank1"] <= ten["tpir_rank10"]
    curve = values["curve"]
    assert 10 < len(curve) <= 100
    assert set(curve[0]) == {"threshold", "fpir", "fnir_rank1", "fnir_rank10"}
    assert (curve[0]["fpir"], curve[-1]["fpir"]) == (0, 100)


def test_a_score_without_open_set_has_a_reason(score: SiteScore) -> None:
    values = score_to_json(replace(score, open_set=None, reservation="one person only"))
    assert values["open_set"] is None and values["open_set_reservation"] == "one person only"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_a_plot_is_written_to_the_given_path(score: SiteScore, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"figures{suffix}"
    check_plot_path(path)
    draw_evaluation(path, score, "a model on a site")
    if suffix == ".png":
        with Image.open(path) as picture:
            assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    else:
        assert path.read_bytes()[:5] in (b"<?xml", b"%PDF-")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_plot_states_why_a_panel_is_empty(score: SiteScore, tmp_path: Path) -> None:
    few = replace(score, open_set=None, reservation="open-set metrics need two persons")
    draw_evaluation(tmp_path / "few.svg", few, "t")
    assert "<!-- open-set metrics need two persons -->" in (tmp_path / "few.svg").read_text()


@pytest.mark.parametrize("name", ["figures", "figures.jpg", ".png"])
def test_a_file_name_without_image_suffix_is_rejected(name: str) -> None:
    with pytest.raises(InputError, match=r"has no image suffix: use a name that ends with \.png, \.svg, \.pdf"):
        check_plot_path(Path(name))
