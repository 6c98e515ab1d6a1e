"""The service's search against bare faiss on the same rows, in one run: lone queries, batches, and callers at once.

The bare scan answers row numbers; the service also follows its store, orders by stored features, checks every hit
against SQLite and hands the answer to its caller. Rows are random unit vectors of 512, in a store of their own.

    python benchmarks/bench_index.py [--full]

``--full`` adds a million entries (4 GB of disk, 5 GB of memory, some minutes): memory of the index and time from
opening the store to the first answer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np

from resight.arrays import Feature
from resight.service.index.base import IndexKind, IndexPolicy
from resight.service.index.flat import tune_faiss
from resight.service.records import Collection, Filter, Space, now_us
from resight.service.search.searcher import NearestQuery, Searcher
from resight.service.storage import reads, writes
from resight.service.storage.store import Store

DIM, K, BATCH = 512, 10, 64
PIECE = 10_000
SPACE = Space("be" * 16, "bench", DIM)


def rows_of(count: int, seed: int) -> Feature:
    """float32 (count, DIM) unit rows."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


async def filled(path: Path, count: int) -> None:
    """A store with a collection of ``count`` entries, written in large transactions."""
    store = Store(path, dim=DIM)
    made = await store.write(writes.create_collection, Collection("bench", SPACE))

    def piece(connection: object, start: int) -> None:
        now, features = now_us(), rows_of(PIECE, start)
        keys = range(start + 1, start + 1 + PIECE)
        names = "key, collection, entry_id, subject_id, camera_id, track_id, quality, shot_count, created_us"
        connection.executemany(  # type: ignore[attr-defined]
            f"INSERT INTO entry ({names}) VALUES (?, ?, ?, '', '', '', 0, 0, ?)",
            [(key, made.key, str(key), now) for key in keys],
        )
        vectors = [row.tobytes() for row in features]
        connection.executemany(  # type: ignore[attr-defined]
            "INSERT INTO feature (entry, space_id, vector, crc32) VALUES (?, ?, ?, ?)",
            [(key, SPACE.space_id, vector, zlib.crc32(vector)) for key, vector in zip(keys, vectors, strict=True)],
        )

    for start in range(0, count, PIECE):
        await store.write(piece, start)
    store.close()


def resident() -> int:
    """Bytes of this process in memory, of its own: neither files nor shared pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


async def medians_ms(*runs: Callable[[], Awaitable[object]], times: int) -> list[float]:
    """The median of each run in milliseconds, taken in turns, so that the machine's other work meets all alike."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(times + 1):
        for own, run in zip(taken, runs, strict=True):
            started = time.perf_counter()
            await run()
            if turn:  # the first one warms up
                own.append((time.perf_counter() - started) * 1e3)
    return [statistics.median(own) for own in taken]


async def measured(path: Path, kind: IndexKind, count: int) -> None:
    """Print the figures of one kind over one store."""
    gc.collect()
    before, started = resident(), time.perf_counter()
    store = Store(path, dim=DIM, quick_check_s=5.0)
    searcher = Searcher(store, IndexPolicy(kind=kind))
    await searcher.load()
    collection = await store.read(reads.collection, "bench")
    asked = [NearestQuery(row, K, Filter()) for row in rows_of(BATCH, 10**9)]
    await searcher.search(collection, asked[:1], with_features=False)
    took_s, held, found = time.perf_counter() - started, resident() - before, searcher.stats(collection).index_bytes
    print(f"{count} {kind}: {took_s:.1f} s from opening to the first answer, {held / 1e6:.0f} MB resident, ", end="")
    print(f"{found / 1e6:.0f} MB found")
    index, queries = bare(kind, count), np.stack([one.feature for one in asked])
    pool = ThreadPoolExecutor(1, initializer=tune_faiss(DIM).apply, initargs=(DIM,))

    async def scan(few: Feature) -> None:
        await asyncio.get_running_loop().run_in_executor(pool, index.search, few, K)

    async def callers() -> None:
        await asyncio.gather(*(searcher.search(collection, [one], with_features=False) for one in asked))

    lone, bare_lone, batch, bare_batch, crowd = await medians_ms(
        lambda: searcher.search(collection, asked[:1], with_features=False),
        lambda: scan(queries[:1]),
        lambda: searcher.search(collection, asked, with_features=False),
        lambda: scan(queries),
        callers,
        times=5 if count > 100_000 else 25,
    )
    pool.shutdown()
    searcher.close()
    store.close()
    print(f"    lone query {lone:.2f} ms, bare {bare_lone:.2f} ms: {lone / bare_lone:.2f}x, {lone - bare_lone:+.2f} ms")
    print(
        f"    batch of {BATCH} {batch / BATCH:.2f} ms each, bare {bare_batch / BATCH:.2f} ms: {batch / bare_batch:.2f}x"
    )
    print(
        f"    {BATCH} callers at once {crowd / BATCH:.2f} ms each: {lone * BATCH / crowd:.1f}x the rate of one by one"
    )


def bare(kind: IndexKind, count: int) -> faiss.Index:
    """The same rows in faiss alone."""
    index = (
        faiss.IndexFlatIP(DIM)
        if kind == "flat"
        else faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    )
    for start in range(0, count, PIECE):
        index.add(rows_of(PIECE, start))
    return index


async def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="a million entries too")
    sizes = (10_000, 100_000, 1_000_000) if parser.parse_args().full else (10_000, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes:
            path = Path(folder) / f"{count}.sqlite3"
            await filled(path, count)
            for kind in ("flat", "flat-fp16") if count <= 100_000 else ("flat-fp16",):
                await measured(path, kind, count)


if __name__ == "__main__":
    asyncio.run(main())
