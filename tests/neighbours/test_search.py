import numpy as np
import pytest

from resight.neighbours import search
from resight.neighbours.reciprocal import NO_NEIGHBOUR
from resight.neighbours.search import (
    nearest_neighbours,
    search_neighbours,
    search_neighbours_by_camera,
)


def unit_rows(count: int, dim: int, *, people: int | None = None, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim))
    if people:
        rows = rng.normal(size=(people, dim))[np.arange(count) % people] + 0.5 * rows
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def similarity_of(rows: np.ndarray) -> np.ndarray:
    similarity = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(similarity, 2)
    return similarity


@pytest.mark.parametrize(
    "count, k, chunk", [(1, 3, 4), (2, 30, 64), (7, 3, 2), (65, 10, 16), (65, 100, 64), (300, 30, 65)]
)
def test_nearest_neighbours_equal_a_full_sort_with_each_row_first(count: int, k: int, chunk: int) -> None:
    rows = unit_rows(count, 5, seed=count)
    expected = np.argsort(-similarity_of(rows), axis=1, kind="stable")[:, :k]
    assert np.array_equal(nearest_neighbours(rows, k, chunk=chunk), expected)


def test_any_tile_size_gives_the_same_neighbours() -> None:
    rows = unit_rows(1000, 16, people=60)
    expected = nearest_neighbours(rows, 30, chunk=1000)
    for chunk in (64, 100, 128, 511, 512, 2048):
        assert np.array_equal(nearest_neighbours(rows, 30, chunk=chunk), expected)


def test_similarities_belong_to_the_neighbours() -> None:
    rows = unit_rows(150, 8, people=20)
    found = search_neighbours(rows, 12, chunk=64)
    expected = np.einsum("id,ijd->ij", rows, rows[found.indices])
    assert found.similarity == pytest.approx(expected, abs=1e-6) and found.similarity.dtype == np.float32
    assert (np.diff(found.similarity, axis=1) <= 0).all()


@pytest.mark.parametrize("copies, k", [(2, 2), (7, 5), (70, 30)])
def test_duplicate_crops_rank_after_the_row_itself(copies: int, k: int) -> None:
    rows = np.repeat(unit_rows(3, 4), copies, axis=0)
    found = search_neighbours(rows, k, chunk=64)
    assert np.array_equal(found.indices[:, 0], np.arange(3 * copies))
    assert found.similarity == pytest.approx(np.ones_like(found.similarity), abs=1e-6)
    assert all(len(set(row)) == k for row in found.indices)


def test_few_entries_of_a_tile_are_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only entries that may be among a row's best are visited, which makes the search fast."""
    seen: list[int] = []
    original = search._pad_rows

    def counting(*arguments):
        seen.append(len(arguments[0]))
        return original(*arguments)

    monkeypatch.setattr(search, "_pad_rows", counting)
    search_neighbours(unit_rows(4096, 16), 10, chunk=1024)
    assert sum(seen) < 0.02 * 4096**2


@pytest.mark.parametrize("count, chunk", [(90, 64), (300, 128), (300, 2048)])
@pytest.mark.parametrize("k_intra, k_inter", [(6, 21), (2, 1), (400, 400)])
def test_neighbours_by_camera_equal_full_sorts(count: int, chunk: int, k_intra: int, k_inter: int) -> None:
    rows = unit_rows(count, 6, people=30, seed=4)
    # a camera with one crop, one with three, numbers other than 0..C-1
    cameras = np.random.default_rng(0).choice([-5, 9, 1000], count)
    cameras[7], cameras[[11, 40, 60]] = 3, 77
    similarity = similarity_of(rows)
    intra, inter = search_neighbours_by_camera(rows, cameras, k_intra, k_inter, chunk=chunk)
    for i in range(count):
        order = np.argsort(-similarity[i], kind="stable")
        for found, allowed, k in ((intra, cameras == cameras[i], k_intra), (inter, cameras != cameras[i], k_inter)):
            expected = [j for j in order if allowed[j]][:k]
            assert found.indices[i].tolist() == expected + [NO_NEIGHBOUR] * (min(k, count) - len(expected))
            assert found.similarity[i, 1 : len(expected)] == pytest.approx(similarity[i, expected[1:]], abs=1e-6)
    assert np.array_equal(intra.indices[:, 0], np.arange(count))


def test_a_single_camera_has_no_neighbours_in_others() -> None:
    intra, inter = search_neighbours_by_camera(unit_rows(9, 4), np.full(9, 3), 4, 4)
    assert np.array_equal(intra.indices, nearest_neighbours(unit_rows(9, 4), 4))
    assert (inter.indices == NO_NEIGHBOUR).all() and (inter.similarity == 0).all()
