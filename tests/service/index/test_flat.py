import numpy as np
import pytest

from resight.service.index.flat import GATHER_QUERIES, FlatIndex

DIM = 24


def reference_nearest(rows, keys, query, k):
    """Every similarity, sorted by it and then by key."""
    scored = sorted(
        (-float(np.clip((row * query).sum(), -1, 1)), int(key)) for row, key in zip(rows, keys, strict=True)
    )
    return [key for _, key in scored[:k]]


def unit(rng, count):
    rows = rng.normal(size=(count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def filled():
    rng = np.random.default_rng(0)
    rows = unit(rng, 700)
    rows[50:80] = rows[3]  # thirty copies: ties must come in order of their keys
    keys = np.cumsum(rng.integers(1, 5, 700)).astype(np.int64)
    index = FlatIndex(DIM)
    for start in range(0, 700, 111):
        index.add(keys[start : start + 111], rows[start : start + 111])
    return index, keys, rows


@pytest.mark.parametrize("queries", [1, GATHER_QUERIES + 3])
@pytest.mark.parametrize("share", [None, 2, 30])
@pytest.mark.parametrize("k", [1, 7, 40, 2000])
def test_equals_brute_force(filled, queries, share, k):
    index, keys, rows = filled
    query_rows = np.concatenate([rows[:queries], unit(np.random.default_rng(1), 2)])
    among = None if share is None else keys[::share]
    chosen = slice(None, None, share)
    for query, (found, similarities) in zip(query_rows, index.search(query_rows, k, among=among), strict=True):
        assert found.tolist() == reference_nearest(rows[chosen], keys[chosen], query, k)
        assert np.all(np.diff(similarities) <= 0) and similarities[0] <= 1.0


def test_a_similarity_does_not_depend_on_the_rest_of_the_search(filled):
    index, keys, rows = filled
    alone = dict(zip(*(part.tolist() for part in index.search(rows[:1], 700)[0]), strict=True))
    batch = dict(zip(*(part.tolist() for part in index.search(rows[:20], 700)[0]), strict=True))
    among = dict(zip(*(part.tolist() for part in index.search(rows[:1], 700, among=keys[::3])[0]), strict=True))
    assert alone == batch and among.items() <= alone.items()


def test_removed_entries_are_never_found_and_the_rest_is(filled):
    index, keys, rows = filled
    index.remove(np.concatenate([keys[::2], np.array([10**9])]))
    assert len(index) == 350
    for query, (found, _) in zip(rows[:10], index.search(rows[:10], 20), strict=True):
        assert found.tolist() == reference_nearest(rows[1::2], keys[1::2], query, 20)
    assert np.array_equal(index.vectors(keys[1::2])[1], rows[1::2])
    later = keys[-1:] + 5
    index.add(later, rows[:1])
    assert index.search(rows[:1], 1)[0][0].tolist() == later.tolist()


def test_adding_present_keys_again_changes_nothing(filled):
    index, keys, rows = filled
    index.add(keys[-10:], rows[-10:])
    assert len(index) == 700


def test_an_empty_index_and_an_empty_selection_find_nothing(filled):
    index, keys, rows = filled
    assert FlatIndex(DIM).search(rows[:2], 5)[1][0].tolist() == []
    assert index.search(rows[:1], 5, among=np.array([keys[-1] + 1]))[0][0].tolist() == []
