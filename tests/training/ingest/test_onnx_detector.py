"""ONNX detectors: constructed graphs with every head, run by onnxruntime, and invalid outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from resight.errors import DetectorError
from resight.training.ingest.detector import open_detector
from resight.training.ingest.footage import Frame, FramePosition
from resight.training.ingest.onnx_detector import letterbox, read_ssd, read_yolo

HEIGHT, WIDTH = 180, 320
PEOPLE = np.array([[40, 30, 90, 150], [200, 20, 260, 170]], float)  # xyxy in the frame


def frame(red: int = 0) -> Frame:
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, :, 0] = red
    return Frame(image, FramePosition(0, 0), 0.0)


def save(path: Path, nodes, inputs, outputs, weights, **more) -> Path:
    graph = helper.make_graph(
        nodes, "detector", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, value in more.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, path)
    return path


def yolo(
    path: Path, table: np.ndarray, size=(160, 160), *, free: bool = False, score_columns=slice(4, 5), **more
) -> Path:
    """A graph that returns `table` (rows, columns), with the score columns scaled by the red of the image.

    The red of all pixels, letterbox included, is the mean of plane 0.
    """
    version_8 = table.shape[0] < table.shape[1]
    scores = np.zeros_like(table)
    where = (score_columns, slice(None)) if version_8 else (slice(None), score_columns)
    scores[where] = 1
    shape = ["batch", 3, "height", "width"] if free else [1, 3, *size]
    nodes = [
        helper.make_node("Slice", ["images", "from", "to", "axis"], ["red"]),
        helper.make_node("ReduceMax", ["red"], ["most"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["scored", "most"], ["lit"]),
        helper.make_node("Add", ["plain", "lit"], ["rows"]),
        helper.make_node("Unsqueeze", ["rows", "first"], ["output0"]),
    ]
    weights = {
        "from": np.array([0]), "to": np.array([1]), "axis": np.array([1]), "first": np.array([0]),
        "plain": (table * (1 - scores)).astype(np.float32), "scored": (table * scores).astype(np.float32),
    }  # fmt: skip
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, None if free else [1, *table.shape])],
        weights,
        **more,
    )


def in_canvas(xyxy: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centre and sides of a frame's boxes in the letterboxed input."""
    scale = min(size[0] / HEIGHT, size[1] / WIDTH)
    border = np.array([(size[1] - WIDTH * scale) / 2, (size[0] - HEIGHT * scale) / 2])
    corner, far = xyxy[:, :2] * scale + border, xyxy[:, 2:] * scale + border
    return np.concatenate([(corner + far) / 2, far - corner], 1)


def version_8(size=(160, 160), classes: int = 3, person: int = 0) -> np.ndarray:
    """(4 + C, N): both people, one of them twice, an object, and noise."""
    boxes = in_canvas(PEOPLE, size)
    rows = np.zeros((4 + classes, 40), np.float32)
    rows[:4] = 5
    rows[:4, :2] = boxes.T
    rows[4 + person, :2] = [0.9, 0.8]
    rows[:4, 2] = boxes[0] + [1, 1, 0, 0]  # nearly the same place
    rows[4 + person, 2] = 0.7
    rows[:4, 3] = boxes[1] * 0.5
    rows[4 + (person + 1) % classes, 3] = 0.95  # of another class
    rows[4 + person, 3] = 0.3
    rows[4 + person, 4:] = 0.05  # below the minimum score
    return rows


def version_5(size=(160, 160)) -> np.ndarray:
    """(N, 5 + C), the same boxes."""
    eight = version_8(size)
    return np.concatenate([eight[:4].T, np.full((40, 1), 0.9, np.float32), eight[4:].T / 0.9], 1)


@pytest.mark.parametrize("size", [(160, 160), (96, 160), (200, 128)])
@pytest.mark.parametrize("head", ["v8", "v5"])
def test_yolo_boxes_are_in_frame_coordinates(tmp_path: Path, head: str, size: tuple[int, int]) -> None:
    table = version_8(size) if head == "v8" else version_5(size)
    path = yolo(tmp_path / "d.onnx", table, size, score_columns=slice(4, 7) if head == "v8" else slice(4, 5))
    detector = open_detector(str(path))
    boxes = detector.find(frame(255))
    np.testing.assert_allclose(boxes.xyxy, PEOPLE, atol=1.5)  # the letterbox rounds to whole pixels
    np.testing.assert_allclose(boxes.scores, [0.9, 0.8], atol=1e-5)
    half = detector.find(frame(204))  # the input is RGB of 0..1; the borders are 114
    np.testing.assert_allclose(half.scores, [0.72, 0.64], atol=1e-5)


def test_a_yolo_of_free_size_gets_640_pixels_in_steps_of_32(tmp_path: Path) -> None:
    table = version_8((384, 640))  # 320 x 180 at twice its size, in whole steps
    boxes = open_detector(str(yolo(tmp_path / "d.onnx", table, free=True))).find(frame(255))
    np.testing.assert_allclose(boxes.xyxy, PEOPLE, atol=1)


def test_the_person_class_is_read_from_the_class_names(tmp_path: Path) -> None:
    path = yolo(
        tmp_path / "d.onnx", version_8(person=2), score_columns=slice(4, 7), names="{0: 'car', 1: 'dog', 2: 'person'}"
    )
    np.testing.assert_allclose(open_detector(str(path)).find(frame(255)).xyxy, PEOPLE, atol=1.5)
    path = yolo(tmp_path / "e.onnx", version_8(), score_columns=slice(4, 7), names="__import__('os').abort()")
    assert len(open_detector(str(path)).find(frame(255))) == 2  # COCO's, since the metadata has no valid names


def test_letterbox_keeps_the_aspect_ratio_with_grey_borders() -> None:
    image = np.full((50, 100, 3), 255, np.uint8)
    canvas, scale, left, top = letterbox(image, (200, 200))
    assert (scale, left, top) == (2, 0, 50)
    assert (canvas[50:150] == 255).all() and (canvas[:50] == 114).all() and (canvas[150:] == 114).all()


@pytest.mark.parametrize("shape", [(1, 3), (2, 6, 40), (1, 4, 4), (1, 300, 6), (40,), (1, 80, 5)])
def test_outputs_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DetectorError, match=r"YOLO|suppression|classes"):
        read_yolo(np.zeros(shape, np.float32), 1 if shape == (1, 80, 5) else 0)


def test_non_finite_boxes_are_dropped() -> None:
    rows = version_8()
    rows[0, 0] = np.nan
    rows[4, 1] = np.nan
    xyxy, scores = read_yolo(rows[None], 0)
    assert len(xyxy) == 1 and np.isfinite(xyxy).all() and scores.tolist() == [pytest.approx(0.7)]


def ssd(path: Path, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, *, names=("boxes", "labels", "scores"),
        planes: bool = True, kind=TensorProto.FLOAT, batched: bool = True, size=(90, 160)) -> Path:  # fmt: skip
    """A graph that returns boxes, labels and scores; scores times the brightest pixel, of 0..1 or 0..255."""
    shape = ([1] if batched else []) + ([3, *size] if planes else [*size, 3])
    whitest = 255.0 if kind == TensorProto.UINT8 else 1.0
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["float"], ["most"], keepdims=0),
        helper.make_node("Mul", ["s", "most"], [names[2]]),
        helper.make_node("Identity", ["b"], [names[0]]),
        helper.make_node("Identity", ["l"], [names[1]]),
    ]
    weights = {"b": boxes.astype(np.float32), "l": labels, "s": (scores / whitest).astype(np.float32)}
    outputs = [
        helper.make_tensor_value_info(names[0], TensorProto.FLOAT, boxes.shape),
        helper.make_tensor_value_info(names[1], helper.np_dtype_to_tensor_dtype(labels.dtype), labels.shape),
        helper.make_tensor_value_info(names[2], TensorProto.FLOAT, scores.shape),
    ]
    if names[0] == "detection_boxes":  # TensorFlow also has the number of boxes
        nodes.append(helper.make_node("ReduceMax", ["float"], ["num_detections"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("num_detections", TensorProto.FLOAT, []))
    return save(path, nodes, [helper.make_tensor_value_info("image", kind, shape)], outputs, weights)


LABELS, SCORES = np.array([1, 1, 3, 1]), np.array([0.9, 0.6, 0.9, 0.02])
ALL = np.concatenate([PEOPLE, PEOPLE])
TENSORFLOW = ("detection_boxes", "detection_classes", "detection_scores")
SHARES = ALL / [WIDTH, HEIGHT, WIDTH, HEIGHT]


@pytest.mark.parametrize(
    "boxes, more",
    [
        (ALL / 2, {}),  # pixels of a 90 x 160 input
        (ALL / 2, {"batched": False}),
        (SHARES, {}),
        (SHARES[None], {"planes": False, "kind": TensorProto.UINT8}),
        (SHARES[None][:, :, [1, 0, 3, 2]],
         {"names": TENSORFLOW, "planes": False, "kind": TensorProto.UINT8}),
    ],
)  # fmt: skip
def test_ssd_boxes_are_in_frame_coordinates(tmp_path: Path, boxes: np.ndarray, more: dict) -> None:
    labels = LABELS.astype(np.float32)[None] if "names" in more else LABELS
    scores = SCORES[None] if "names" in more else SCORES
    detector = open_detector(str(ssd(tmp_path / "d.onnx", boxes, labels, scores, **more)))
    found = detector.find(frame(255))
    np.testing.assert_allclose(found.xyxy, PEOPLE, atol=0.01)
    np.testing.assert_allclose(found.scores, [0.9, 0.6], atol=1e-6)


def test_ssd_outputs_of_different_lengths_are_refused() -> None:
    with pytest.raises(DetectorError, match="boxes, labels and scores"):
        read_ssd(np.zeros((3, 4)), np.zeros(2), np.zeros(3), (9, 9), rows_first=False)


def test_a_graph_that_fails_on_a_frame_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["images", "shape"], ["output0"])]
    path = save(
        tmp_path / "d.onnx",
        nodes,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)],
        {"shape": np.array([1, 7, 5])},
    )
    with pytest.raises(DetectorError, match="failed on a frame"):
        open_detector(str(path)).find(frame())


def test_identity_depends_on_the_bytes_of_the_file(tmp_path: Path) -> None:
    one = open_detector(str(yolo(tmp_path / "a.onnx", version_8())))
    two = open_detector(str(yolo(tmp_path / "b.onnx", version_8())))
    assert (
        one.identity
        == two.identity
        != open_detector(str(yolo(tmp_path / "c.onnx", version_8((96, 96)), (96, 96)))).identity
    )
    with pytest.raises(DetectorError, match="cannot be read"):
        open_detector(str(tmp_path / "none.onnx"))


def test_the_letterbox_contains_the_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((160, 120)))
    canvas, scale, left, top = letterbox(image, (120, 200))
    assert (scale, left, top) == (1, 20, 0) and (canvas[:, 20:180] == image).all()
