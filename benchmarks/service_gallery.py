"""Enrolling and searching features through the service, against bare faiss; memory and restart of a large gallery."""

from __future__ import annotations

import statistics
import time

import faiss
import numpy as np
from load import SEARCH, Load, put
from pieces import TOP_K, Bench, Row, Rows, ServerWatch, fill, rows_of, sure

from resight.client import Client, GivenFeature
from resight.v1 import common_pb2, search_pb2

BACKBONE, DIM = "osnet_x0_25", 512
ENTRIES, LARGE = 100_000, 1_000_000
QUERIES = 64
ENROLMENTS = 10_000  # a second, with features supplied
GIB, LARGE_BYTES = 1024**3, 2.5e9


def _requests(space_id: str) -> list[bytes]:
    return [
        search_pb2.SearchRequest(
            collection_id="bench",
            embedding=common_pb2.Embedding(float32_le=row.tobytes(), space_id=space_id),
            top_k=TOP_K,
        ).SerializeToString()
        for row in rows_of(QUERIES, DIM, seed=-1 % 2**32)
    ]


def _bare_ms(index: faiss.Index, seconds: float) -> float:
    """Median of lone searches."""
    queries, taken = rows_of(QUERIES, DIM, seed=7), []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for query in queries:
            started = time.perf_counter()
            index.search(query[None], TOP_K)
            taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def index(bench: Bench) -> Rows:
    """A hundred thousand entries: enrolled, and searched exactly one query after the other."""
    bundle = bench.bundle(BACKBONE)
    bare = faiss.IndexFlatIP(DIM)
    bare.add(rows_of(ENTRIES, DIM, seed=1))
    with bench.serving(bundle, "data-index") as (address, _):
        rate = fill(address, bundle, ENTRIES)
        found = f"{rate:.0f} entries/s, each call on disk when answered"
        yield Row("enrolments with features supplied", found, f">= {ENROLMENTS}", rate >= ENROLMENTS)
        load = Load(address, SEARCH, _requests(bundle.manifest.space_id), bench.seconds, 0.5, in_flight=1, keep=True)
        more, scans, through = [], [], []
        for _ in range(bench.rounds):
            scans.append(_bare_ms(bare, bench.seconds / 2))
            outcome = sure(put(load))
            through.append(statistics.median(outcome.good_s) * 1e3)
            more.append(through[-1] - scans[-1])
        together = sure(put(Load(address, SEARCH, load.requests, bench.seconds, 0.5))).rate
    assert all(search_pb2.SearchResponse.FromString(answer).exact for answer in outcome.answers)
    extra = statistics.median(more)
    found = (
        f"{statistics.median(through):.2f} ms through the service, {statistics.median(scans):.2f} ms bare faiss: "
        f"{extra:+.2f} ms"
    )
    yield Row(f"exact search of {ENTRIES:,} x {DIM}, p50", found, "within 3 ms", extra <= 3)
    lone = statistics.median(scans)
    yield Row("the same with 32 in flight", f"{together:.0f}/s, {together * lone / 1e3:.1f} times lone bare scans")


def large(bench: Bench) -> Rows:
    """A million entries: memory beside a server that holds none, and from the start of the process to the answer."""
    bundle = bench.bundle(BACKBONE)
    with bench.serving(bundle, "data-large") as (address, watch):
        empty = watch.resident()
        rate = fill(address, bundle, LARGE)
        yield Row(f"enrolling {LARGE:,} with features supplied", f"{rate:.0f} entries/s", f">= {ENROLMENTS}",
                  rate >= ENROLMENTS)  # fmt: skip
    started = time.perf_counter()
    with bench.serving(bundle, "data-large") as (address, watch):
        with Client(address, timeout_s=120) as client:
            query = GivenFeature(rows_of(1, DIM, seed=3)[0], bundle.manifest.space_id)
            client.search("bench", query)
            taken_s = time.perf_counter() - started
        yield Row("restart to the first answer", f"{taken_s:.1f} s", "< 30 s", taken_s < 30)
        requests = _requests(bundle.manifest.space_id)
        lone = sure(put(Load(address, SEARCH, requests, bench.seconds, 0.5, in_flight=1)))
        many = sure(put(Load(address, SEARCH, requests, bench.seconds, 0.5)))
        took = _settled(watch) - empty
    yield Row("memory of the index", f"{took / 1e9:.2f} GB above the empty server", "< 2.5 GB", took < LARGE_BYTES)
    found = f"{np.median(lone.good_s) * 1e3:.1f} ms lone, {many.rate:.0f}/s with 32 in flight"
    yield Row(f"search of {LARGE:,} x {DIM}", found)


def _settled(watch: ServerWatch) -> int:
    """Resident bytes once they no longer grow."""
    before, now = 0, watch.resident()
    while now > before + 10_000_000:
        time.sleep(1.0)
        before, now = now, watch.resident()
    return now
