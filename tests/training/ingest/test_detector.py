"""Torchvision's detectors with random weights, and weights that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from resight.errors import DetectorError
from resight.training.ingest.boxes import COCO_PERSON, MIN_SCORE
from resight.training.ingest.detector import TORCHVISION_BUILDERS, TorchvisionDetector, open_detector
from resight.training.ingest.footage import Frame, FramePosition

FRAME = Frame(np.random.default_rng(0).integers(0, 255, (180, 320, 3), np.uint8), FramePosition(0, 0), 0.0)


@pytest.fixture(scope="module")
def ssdlite() -> dict[str, torch.Tensor]:
    """Weights that find people everywhere: the head's bias prefers them."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(TORCHVISION_BUILDERS["ssdlite"], weights=None, weights_backbone=None)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("head.classification_head") and name.endswith(".1.bias") and tensor.numel() % 91 == 0:
            tensor.view(-1, 91)[:, COCO_PERSON] = 6.0
    return dict(state)


def test_all_names_are_torchvision_detectors_with_weights() -> None:
    for builder in TORCHVISION_BUILDERS.values():
        assert torchvision.models.get_model_weights(builder).DEFAULT.meta["categories"][COCO_PERSON] == "person"


def test_weights_on_disk_make_boxes_of_people_within_the_frame(
    ssdlite: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(ssdlite, tmp_path / "w.pth")
    detector = open_detector("ssdlite", weights=tmp_path / "w.pth")
    boxes = detector.find(FRAME)
    assert len(boxes) > 0 and boxes.xyxy.dtype == np.float64
    assert (boxes.xyxy >= 0).all() and (boxes.xyxy <= [320, 180, 320, 180]).all()
    assert (boxes.scores >= MIN_SCORE).all() and (boxes.given == -1).all()
    again = TorchvisionDetector("ssdlite", weights=None, state=ssdlite)
    assert again.identity == detector.identity
    np.testing.assert_array_equal(again.find(FRAME).xyxy, boxes.xyxy)
    ssdlite_other = {name: tensor + 1 if name.endswith("1.bias") else tensor for name, tensor in ssdlite.items()}
    assert TorchvisionDetector("ssdlite", weights=None, state=ssdlite_other).identity != detector.identity


@pytest.mark.slow
def test_a_two_stage_detector_runs() -> None:
    torch.manual_seed(0)
    builder = TORCHVISION_BUILDERS["fasterrcnn-mobilenet"]
    state = torchvision.models.get_model(builder, weights=None, weights_backbone=None).state_dict()
    boxes = TorchvisionDetector("fasterrcnn-mobilenet", weights=None, state=state).find(FRAME)
    assert boxes.xyxy.shape == (len(boxes), 4)


def test_weights_that_do_not_fit_are_refused(ssdlite: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("other", "does not fit"),
        ("noise", "read safely"),
        ("list", "contains list"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(DetectorError, match=message):
            open_detector("ssdlite", weights=tmp_path / f"{name}.pth")


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match="expected fasterrcnn-mobilenet"):
        open_detector("yolo")
    with pytest.raises(DetectorError, match="omit --detector-weights"):
        open_detector("a.onnx", weights=tmp_path / "w.pth")


def test_without_a_network_the_required_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps its proxy settings, also for later tests
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DetectorError, match=r"copy the file ssdlite320_.*\.pth there"):
        open_detector("ssdlite")
