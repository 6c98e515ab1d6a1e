"""Calibration: probability and its inverse, decisions, and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from resight.calibration import MAX_SLOPE, MAX_SOURCE, Calibration
from resight.errors import BundleError, InputError

SOUND = Calibration(0.4, 20.0, 0.98, 0.3, 0.001, 0.05, 36_000, 160_000, "tracks that share a cluster", "chance", 0.01)


def density(x: float, mean: float, deviation: float) -> float:
    return math.exp(-(((x - mean) / deviation) ** 2) / 2)


@pytest.mark.parametrize("prior", [0.5, 0.01, 0.9])
def test_probabilities_follow_bayes_rule_for_two_gaussians(prior: float) -> None:
    low, high, deviation = 0.2, 0.7, 0.11
    line = replace(SOUND, midpoint=(low + high) / 2, slope=(high - low) / deviation**2)
    for similarity in (-0.3, 0.1, 0.45, 0.5, 0.8):
        one = prior * density(similarity, high, deviation)
        two = (1 - prior) * density(similarity, low, deviation)
        assert line.probability(similarity, prior=prior) == pytest.approx(one / (one + two), rel=1e-9)


def test_the_curve_equals_a_manual_calculation() -> None:
    assert SOUND.probability(0.4) == 0.5
    assert SOUND.probability(0.4 + math.log(3) / 20) == pytest.approx(0.75)
    assert SOUND.probability(0.4, prior=1 / 101) == pytest.approx(1 / 101)
    assert SOUND.probability([[0.4], [0.4]]).shape == (2, 1) and SOUND.probability([]).shape == (0,)
    assert np.isnan(SOUND.probability(math.nan))


@pytest.mark.parametrize("slope", [1e-3, 20.0, MAX_SLOPE])
def test_the_curve_is_monotonic_and_does_not_overflow(slope: float) -> None:
    line = replace(SOUND, slope=slope)
    for prior in (1e-9, 0.5, 1 - 1e-9):
        found = line.probability(np.linspace(-1.1, 1.1, 10_001), prior=prior)
        assert (np.diff(found) >= 0).all() and found.min() >= 0 and found.max() <= 1


def test_similarity_is_the_inverse() -> None:
    probabilities = np.array([[1e-6, 0.1], [0.5, 0.999]])
    assert SOUND.probability(SOUND.similarity(probabilities)) == pytest.approx(probabilities, rel=1e-9)
    for outside in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="between 0 and 1"):
            SOUND.similarity([0.5, outside])
        with pytest.raises(InputError, match="prior between 0 and 1"):
            SOUND.probability(0.5, prior=outside)


def test_three_decisions() -> None:
    accept, reject = (float(SOUND.similarity(p)) for p in (SOUND.accept, SOUND.reject))
    decisions = [
        SOUND.decide(s) for s in (1.0, accept + 1e-6, accept - 1e-6, reject + 1e-6, reject - 1e-6, -1.0, math.nan)
    ]
    assert decisions == ["match", "match", "uncertain", "uncertain", "unknown", "unknown", "unknown"]
    certain = replace(SOUND, reject=SOUND.accept)
    assert {certain.decide(s) for s in np.linspace(-1, 1, 99)} == {"match", "unknown"}


def test_a_calibration_round_trips_through_json() -> None:
    text = json.dumps(SOUND.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(text)) == SOUND
    with pytest.raises(FrozenInstanceError):
        SOUND.slope = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"midpoint": math.nan}, "midpoint: expected -1..1, found 'nan'"),
        ({"midpoint": 1.5}, "midpoint"),
        ({"midpoint": "0.4"}, "midpoint: expected float"),
        ({"slope": 0.0}, "slope: expected more than 0"),
        ({"slope": -3.0}, "slope"),
        ({"slope": math.inf}, "slope"),
        ({"slope": 20}, "slope: expected float, found '20'"),
        ({"slope": True}, "slope: expected float"),
        ({"slope": None}, "slope: expected float"),
        ({"accept": 1.0}, "accept: expected between 0 and 1"),
        ({"reject": 0.0}, "reject: expected between 0 and 1"),
        ({"reject": 0.99}, "reject: expected no more than accept, 0.98, found '0.99'"),
        ({"false_accept_share": math.nan}, "false_accept_share"),
        ({"false_reject_share": 1.0}, "false_reject_share"),
        ({"positives": 0}, "positives: expected 1 or more"),
        ({"negatives": 1.0}, "negatives: expected int"),
        ({"negatives": True}, "negatives: expected int"),
        ({"positive_source": ""}, f"positive_source: expected 1..{MAX_SOURCE} characters"),
        ({"negative_source": "x" * (MAX_SOURCE + 1)}, "negative_source"),
        ({"negative_source": ["x"]}, "negative_source: expected str"),
        ({"error": -0.1}, "error: expected 0..1"),
        ({"knots": []}, "unknown \\['knots'\\]"),
    ],
)
def test_invalid_values_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=f"calibration: .*{message}.*export the bundle again"):
        Calibration.from_json(SOUND.to_json() | change)


@pytest.mark.parametrize("body", [None, [], "x", {}, {1: 2}])
def test_other_json_is_rejected(body: object) -> None:
    with pytest.raises(BundleError, match=r"calibration: its (value|keys): expected"):
        Calibration.from_json(body)


def test_a_missing_key_is_named() -> None:
    body = SOUND.to_json()
    del body["slope"]
    with pytest.raises(BundleError, match=r"missing \['slope'\], unknown \[\]"):
        Calibration.from_json(body)
