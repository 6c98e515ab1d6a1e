import math

import numpy as np
import pytest

from resight.arrays import cosine_similarity
from resight.errors import InputError


def test_cosine_similarity_equals_its_definition_for_rows_of_any_length():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)) * 1000, rng.normal(size=(3, 5)).astype(np.float32)
    found = cosine_similarity(a, b)
    assert found.shape == (7, 3) and found.dtype == np.float32
    for i in range(7):
        for j in range(3):
            dot = sum(float(x) * float(y) for x, y in zip(a[i], b[j], strict=True))
            lengths = math.sqrt(sum(float(x) ** 2 for x in a[i])) * math.sqrt(sum(float(y) ** 2 for y in b[j]))
            assert found[i, j] == pytest.approx(dot / lengths, abs=1e-6)


def test_a_row_with_itself_is_exactly_one():
    rows = np.random.default_rng(1).normal(size=(200, 33)).astype(np.float32)
    found = cosine_similarity(rows, rows)
    assert np.diag(found) == pytest.approx(1.0, abs=1e-6)
    assert found.max() <= 1.0 and found.min() >= -1.0


def test_tiny_and_huge_rows_neither_underflow_nor_overflow():
    rows = np.array([[1e-30, 0.0], [1e30, 0.0]], np.float32)
    assert cosine_similarity(rows, rows).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_no_rows_give_no_similarities():
    assert cosine_similarity(np.empty((0, 4)), np.ones((3, 4))).shape == (0, 3)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones(3), np.ones((1, 3))),
        (np.ones((2, 3)), np.ones((2, 4))),
        (np.zeros((1, 3)), np.ones((1, 3))),
        (np.ones((1, 3)), np.array([[1.0, np.nan, 0.0]])),
        (np.array([[np.inf, 0.0, 0.0]]), np.ones((1, 3))),
    ],
)
def test_zero_and_infinite_rows_are_rejected(a, b):
    with pytest.raises(InputError):
        cosine_similarity(a, b)
