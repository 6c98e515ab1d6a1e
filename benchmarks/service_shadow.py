"""What callers notice of a shadow that samples every search: their times with it over those without, in turns."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from load import SEARCH, Load, put
from pieces import Bench, Row, Rows, bundle_of, sure

from resight.client import Client, NewEntry, Shadow

BACKBONE = "osnet_x0_25"
COLLECTION, CANDIDATE = "bench", "candidate"
PARTS = (0.25, 0.6)  # of what the service can do: a quiet site, and a busy one
WARM_S = 0.5
NOTICED = 1.1  # of the median; the 95th percentile waits for one batch of the shadow's now and then


@contextmanager
def _migrated(bench: Bench) -> Iterator[tuple[str, Client]]:
    """A server whose collection holds both models' features."""
    active = bench.bundle(BACKBONE)
    root = bench.folder / "shadow-models"
    shutil.copytree(active.path, root / "active")
    bundle_of(BACKBONE, root / CANDIDATE, seed=1)
    with bench.serving(active, "data-shadow", models=str(root)) as (address, _), Client(address) as client:
        client.create_collection(COLLECTION, unlimited_retention=True, keep_crops=True)
        client.enrol_batch(COLLECTION, [NewEntry(jpeg, str(number)) for number, jpeg in enumerate(bench.jpegs)])
        client.wait(client.load_model(CANDIDATE))
        client.wait(client.migrate(COLLECTION, CANDIDATE))
        yield address, client


def shadow(bench: Bench) -> Rows:
    """Searches by crop at parts of the peak, without a shadow and with one, by turns."""
    with _migrated(bench) as (address, client):
        requests = bench.searches(COLLECTION)
        peak = sure(put(Load(address, SEARCH, requests, bench.seconds, WARM_S))).rate
        for part in PARTS:
            load = Load(address, SEARCH, requests, bench.seconds, WARM_S, rate=part * peak)
            alone, beside, told = [], [], []
            for _ in range(bench.rounds):
                alone.append(_times(load))
                client.start_shadow(COLLECTION, CANDIDATE)
                beside.append(_times(load))
                told.append(client.stop_shadow(COLLECTION))
            yield _row(f"a shadow of all searches, {part:.0%} of the peak of {peak:.0f}/s", alone, beside, told)


def _times(load: Load) -> tuple[float, float]:
    """Median and 95th percentile of calls, in milliseconds."""
    median, late = np.percentile(sure(put(load)).good_s, (50, 95)) * 1e3
    return float(median), float(late)


def _row(what: str, alone: list[tuple[float, float]], beside: list[tuple[float, float]], told: list[Shadow]) -> Row:
    ratios = [[with_[at] / without[at] for without, with_ in zip(alone, beside, strict=True)] for at in (0, 1)]
    median, late = (statistics.median(one) for one in ratios)
    before = [statistics.median(one[at] for one in alone) for at in (0, 1)]
    answered, sampled = (sum(getattr(one.figures, name) for one in told) for name in ("answered", "sampled"))
    times = f"p50 x {median:.2f}, p95 x {late:.2f} (alone {before[0]:.1f} and {before[1]:.1f} ms)"
    return Row(what, f"{times}; {answered} of {sampled} answered", f"p50 x <= {NOTICED}", median <= NOTICED)
