"""What callers notice of a shadow that samples every search, and of a migration: their times beside it over without."""

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
BATCH = 64
MIGRATED = 4000  # entries: more than are moved within a measurement
DELAYED = 1.5  # of the 95th percentile, while entries move
NOTICED = 1.1  # of the median; the 95th percentile waits for one batch of the shadow's now and then


@contextmanager
def _two_models(bench: Bench, name: str) -> Iterator[tuple[str, Client]]:
    """A server with a second model loaded."""
    active = bench.bundle(BACKBONE)
    root = bench.folder / f"{name}-models"
    shutil.copytree(active.path, root / "active")
    bundle_of(BACKBONE, root / CANDIDATE, seed=1)
    with bench.serving(active, f"data-{name}", models=str(root)) as (address, _), Client(address) as client:
        client.wait(client.load_model(CANDIDATE))
        yield address, client


def _filled(bench: Bench, client: Client, collection: str, count: int) -> None:
    """A collection that keeps its crops."""
    client.create_collection(collection, unlimited_retention=True, keep_crops=True)
    entries = [NewEntry(bench.jpegs[number % len(bench.jpegs)], str(number)) for number in range(count)]
    for start in range(0, count, BATCH):
        client.enrol_batch(collection, entries[start : start + BATCH])


def migration(bench: Bench) -> Rows:
    """Searches by crop at parts of the peak, of a collection at rest and while it is being migrated."""
    with _two_models(bench, "migration") as (address, client):
        _filled(bench, client, COLLECTION, BATCH)
        peak = sure(put(Load(address, SEARCH, bench.searches(COLLECTION), bench.seconds, WARM_S))).rate
        for part in PARTS:
            alone, beside, moved = [], [], 0
            for number in range(bench.rounds):
                name = f"{COLLECTION}-{part * 100:.0f}-{number}"
                _filled(bench, client, name, MIGRATED)
                load = Load(address, SEARCH, bench.searches(name), bench.seconds, WARM_S, rate=part * peak)
                alone.append(_times(load))
                begun = client.migrate(name, CANDIDATE)
                beside.append(_times(load))
                now = client.operation(begun.operation_id)
                assert not now.ended, "the migration ended within the measurement: migrate more entries"
                moved += now.succeeded
                client.wait(client.cancel_operation(begun.operation_id))
            median, late, before = _ratios(alone, beside)
            found = (
                f"p50 x {median:.2f}, p95 x {late:.2f} ({before}); {moved / bench.rounds:.0f} entries moved meanwhile"
            )
            what = f"a migration, {part:.0%} of the peak of {peak:.0f}/s"
            yield Row(what, found, f"p95 x <= {DELAYED}", late <= DELAYED)


def shadow(bench: Bench) -> Rows:
    """Searches by crop at parts of the peak, without a shadow and with one, by turns."""
    with _two_models(bench, "shadow") as (address, client):
        _filled(bench, client, COLLECTION, BATCH)
        client.wait(client.migrate(COLLECTION, CANDIDATE))
        requests = bench.searches(COLLECTION)
        peak = sure(put(Load(address, SEARCH, requests, bench.seconds, WARM_S))).rate
        for part in PARTS:
            load = Load(address, SEARCH, requests, bench.seconds, WARM_S, rate=part * peak)
            alone, beside, found = [], [], []
            for _ in range(bench.rounds):
                alone.append(_times(load))
                client.start_shadow(COLLECTION, CANDIDATE)
                beside.append(_times(load))
                found.append(client.stop_shadow(COLLECTION))
            yield _row(f"a shadow of all searches, {part:.0%} of the peak of {peak:.0f}/s", alone, beside, found)


def _times(load: Load) -> tuple[float, float]:
    """Median and 95th percentile of calls, in milliseconds."""
    median, late = np.percentile(sure(put(load)).good_s, (50, 95)) * 1e3
    return float(median), float(late)


def _ratios(alone: list[tuple[float, float]], beside: list[tuple[float, float]]) -> tuple[float, float, str]:
    """How much longer callers wait, median and 95th percentile, and what they waited alone."""
    ratios = [[with_[at] / without[at] for without, with_ in zip(alone, beside, strict=True)] for at in (0, 1)]
    before = [statistics.median(one[at] for one in alone) for at in (0, 1)]
    median, late = (statistics.median(one) for one in ratios)
    return median, late, f"alone {before[0]:.1f} and {before[1]:.1f} ms"


def _row(what: str, alone: list[tuple[float, float]], beside: list[tuple[float, float]], found: list[Shadow]) -> Row:
    median, late, before = _ratios(alone, beside)
    answered, sampled = (sum(getattr(one.figures, name) for one in found) for name in ("answered", "sampled"))
    times = f"p50 x {median:.2f}, p95 x {late:.2f} ({before})"
    return Row(what, f"{times}; {answered} of {sampled} answered", f"p50 x <= {NOTICED}", median <= NOTICED)
