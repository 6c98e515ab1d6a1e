"""Float16 rows converted by their bits: the same numbers as numpy's, for all values and positions."""

import faiss
import numpy as np
import pytest

from resight.service.index.half import BLOCK_ROWS, MAX_BLOCK_FETCH, scan_blocks

DIM = 24


def half_rows(rows):
    codes = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    codes.add(rows)
    raw = faiss.rev_swig_ptr(codes.codes.data(), codes.ntotal * codes.code_size)
    return codes, raw.view(np.float16).reshape(codes.ntotal, -1).astype(np.float64)


def drawn(shape, seed, scale=1.0):
    return (np.random.default_rng(seed).uniform(-1, 1, shape) * scale).astype(np.float32)


@pytest.mark.parametrize("count", [1, 300, BLOCK_ROWS, BLOCK_ROWS + 1, 5 * BLOCK_ROWS + 17])
@pytest.mark.parametrize("chosen", [False, True])
def test_the_nearest_equal_those_of_numpy(count, chosen):
    codes, exact = half_rows(drawn((count, DIM), seed=count))
    rows = np.arange(0, count, 3) if chosen else None
    queries = drawn((7, DIM), seed=1)
    fetch = min(MAX_BLOCK_FETCH, len(exact) if rows is None else len(rows))
    similarities, found = scan_blocks(codes, queries, fetch, rows)
    assert similarities.dtype == np.float32 and found.shape == similarities.shape == (7, fetch)
    reference = queries.astype(np.float64) @ exact.T
    if rows is not None:
        assert np.isin(found, rows).all()
        reference[:, np.setdiff1d(np.arange(count), rows)] = -np.inf
    np.testing.assert_allclose(similarities, -np.sort(-reference, axis=1)[:, :fetch], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(reference, found, 1), similarities, atol=1e-5)
    assert all(len(set(one.tolist())) == fetch for one in found)


@pytest.mark.parametrize("scale", [1.0, 6e-5, 1e-6, 6e-8, 0.0])
def test_subnormal_float16_numbers_keep_their_value(scale):
    codes, exact = half_rows(drawn((50, DIM), seed=3, scale=scale))
    assert scale in (0.0, 1.0) or 0 < np.abs(exact).max() < 2.0**-14
    queries = drawn((6, DIM), seed=4)
    similarities, found = scan_blocks(codes, queries, 50, None)
    reference = np.take_along_axis(queries.astype(np.float64) @ exact.T, found, 1)
    np.testing.assert_allclose(similarities, reference, rtol=1e-4, atol=1e-6 * scale)


def test_every_finite_float16_is_widened_exactly():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    codes, exact = half_rows(np.stack([halves, np.zeros_like(halves)], axis=1).astype(np.float32))
    assert np.array_equal(exact[:, 0], halves.astype(np.float64))
    query = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    for start in range(0, len(halves), MAX_BLOCK_FETCH):
        rows = np.arange(start, min(start + MAX_BLOCK_FETCH, len(halves)))
        similarities, found = scan_blocks(codes, query, len(rows), rows)
        assert np.array_equal(similarities[0], exact[found[0], 0]) and np.array_equal(
            similarities[1], -exact[found[1], 0]
        )
