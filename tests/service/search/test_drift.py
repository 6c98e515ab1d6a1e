import numpy as np
import pytest

from resight.service.search.statistics import BINS, bin_of, stability_index


def histogram(cosines) -> np.ndarray:
    counts = np.zeros(BINS, np.int64)
    for cosine in cosines:
        counts[bin_of(float(cosine))] += 1
    return counts


def reference_index(before: list[int], now: list[int]) -> float:
    """Reference implementation with loops: a bin belongs to the decile of ``before`` that has its middle."""
    whole, below, part_of = sum(before), 0, []
    for count in before:
        part_of.append(min(9, int(10 * (below + count / 2) / whole)))
        below += count
    shares = []
    for counts in (before, now):
        parts = {part: 0.0 for part in part_of}
        for part, count in zip(part_of, counts, strict=True):
            parts[part] += count
        filled = [max(count, 0.5) for _, count in sorted(parts.items())]
        shares.append([count / sum(filled) for count in filled])
    return sum((q - p) * float(np.log(q / p)) for p, q in zip(*shares, strict=True))


def index_of_deciles(before: np.ndarray, now: np.ndarray) -> float:
    """The index over the exact deciles of ``before``."""
    edges = np.quantile(before, np.arange(1, 10) / 10)
    p, q = (np.bincount(np.searchsorted(edges, some), minlength=10) / len(some) for some in (before, now))
    return float(((q - p) * np.log(q / p)).sum())


def test_bins_are_equal_parts():
    edges = np.linspace(-1, 1, BINS + 1)
    for number in range(BINS):
        assert bin_of(edges[number] + 1e-9) == bin_of(edges[number + 1] - 1e-9) == number
    assert (bin_of(-1.0000001), bin_of(1.0000001)) == (0, BINS - 1)  # a float32's cosine may be


@pytest.mark.parametrize("seed", range(3))
def test_the_index_equals_the_reference_and_is_near_that_of_exact_deciles(seed):
    rng = np.random.default_rng(seed)
    for before, now in (
        (rng.uniform(0.2, 0.9, 57), rng.uniform(0.3, 1.0, 41)),
        (rng.normal(0.7, 0.1, 1000), rng.normal(0.6, 0.12, 1000)),
        (np.full(5, 0.3), np.full(2, -0.3)),
    ):
        counts = histogram(before), histogram(now)
        assert stability_index(*counts) == pytest.approx(reference_index(*(one.tolist() for one in counts)), abs=1e-12)
    exact = index_of_deciles(rng.normal(0.7, 0.1, 4000), rng.normal(0.65, 0.1, 4000))
    binned = stability_index(histogram(rng.normal(0.7, 0.1, 4000)), histogram(rng.normal(0.65, 0.1, 4000)))
    assert binned == pytest.approx(exact, rel=0.35)


def test_drift_is_reported_only_when_scores_move():
    rng = np.random.default_rng(0)
    before = histogram(rng.normal(0.7, 0.05, 1000))
    assert stability_index(before, histogram(rng.normal(0.7, 0.05, 1000))) < 0.1
    assert stability_index(before, histogram(rng.normal(0.62, 0.05, 1000))) > 0.25
