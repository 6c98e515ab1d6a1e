"""Rejection of shots of another person; on real tracks, its true and false rejection rates."""

import re
from collections import defaultdict

import numpy as np
import pytest

from resight.calibration import Calibration
from resight.service.inference.features import MIN_SHOTS, same_person_shots

CURVE = Calibration(0.5, 10.0, 0.95, 0.05, 0.001, 0.05, 100, 100, "tests", "tests", 0.01)


def at(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


@pytest.mark.parametrize("calibration", [None, CURVE])
def test_an_outlier_is_rejected(calibration):
    kept = same_person_shots(at(0, 2, 4, 88, 6, 8), calibration)
    assert kept.tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("calibration", [None, CURVE])
@pytest.mark.parametrize("shots", [at(0), at(0, 90), at(0, 5, 10, 15), at(*[3] * 8), at(0, 20, 40, 60)])
def test_few_or_even_shots_are_all_kept(shots, calibration):
    assert same_person_shots(shots, calibration).all()


def test_a_match_is_never_an_outlier():
    shots = at(0, 0.1, 0.2, 0.3, 0.4, 35)  # an outlier of such a tight cluster, but a match by the calibration
    assert not same_person_shots(shots, None)[-1]
    tight = at(0, 0.1, 0.2, 0.3, 0.4, 37)
    assert same_person_shots(tight, None)[-1] == (1 - np.cos(np.radians(37)) <= 3.5 * 0.05 + 1e-3)
    assert same_person_shots(tight, CURVE)[-1]


def test_the_reject_threshold_applies_to_any_spread():
    assert same_person_shots(at(0, 10, 90), CURVE).tolist() == [True, True, False]
    assert same_person_shots(at(0, 10, 90), None).all()
    assert MIN_SHOTS == 3 and same_person_shots(at(0, 90), CURVE).all()


@pytest.mark.real
def test_foreign_shots_in_real_tracks_are_mostly_rejected(shared_data, shared_weights):
    import onnxruntime

    from resight.image import ImageSpec, decode, fit

    folder = shared_data / "bounding_box_train"
    frames: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for path in sorted(folder.glob("[0-9]*.jpg")):
        person, camera, sequence, frame = re.match(r"(\d+)_c(\d)s(\d)_(\d+)_", path.name).groups()
        frames[camera, sequence, person].append((int(frame), path.name))
    tracks = [
        [name for _, name in own[:5]]
        for own in map(sorted, frames.values())
        if len(own) >= 5 and own[4][0] - own[0][0] < 400
    ]
    tracks = tracks[::3][:24]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    session = onnxruntime.InferenceSession(shared_weights / "osnet_x0_25_msmt17.onnx")

    def embedded(names: list[str]) -> np.ndarray:
        pixels = [fit(decode((folder / name).read_bytes()), ImageSpec(height=256, width=128)) for name in names]
        images = ((np.stack(pixels) / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        (rows,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images)})
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    own = [embedded(names) for names in tracks]
    rejected, lost = 0, 0
    for number, shots in enumerate(own):
        kept = same_person_shots(np.concatenate((shots, own[(number + 7) % len(own)][:1])), None)
        rejected += not kept[-1]
        lost += int((~kept[:-1]).sum())
    assert len(own) >= 20 and rejected >= 0.6 * len(own) and lost <= 0.05 * 5 * len(own)
