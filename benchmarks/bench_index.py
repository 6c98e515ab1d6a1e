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
from pathlib import Path

import faiss
import numpy as np

from resight.service import reads, writes
from resight.service.entries import Collection, Filter, Space, now_us
from resight.service.ladder import Kind, Ladder
from resight.service.runtime import Feature
from resight.service.searcher import Query, Searcher
from resight.service.store import Store
from resight.service.tune import tune

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


async def median_ms(run: Callable[[], Awaitable[object]], *, times: int) -> float:
    """The median of some runs, in milliseconds, after one that warms up."""
    await run()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        await run()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


async def measured(path: Path, kind: Kind, count: int) -> None:
    """Print the figures of one kind over one store."""
    gc.collect()
    before, started = resident(), time.perf_counter()
    store = Store(path, dim=DIM, quick_check_s=5.0)
    searcher = Searcher(store, Ladder(kind=kind))
    await searcher.load()
    collection = await store.read(reads.collection, "bench")
    asked = [Query(row, K, Filter()) for row in rows_of(BATCH, 10**9)]
    await searcher.search(collection, asked[:1], with_features=False)
    print(
        f"{count} {kind}: {time.perf_counter() - started:.1f} s from opening to the first answer, "
        f"{(resident() - before) / 1e6:.0f} MB resident, {searcher.stats(collection).index_bytes / 1e6:.0f} MB told"
    )
    times = 3 if count > 100_000 else 15
    lone = await median_ms(lambda: searcher.search(collection, asked[:1], with_features=False), times=times)
    batch = await median_ms(lambda: searcher.search(collection, asked, with_features=False), times=times)

    async def callers() -> None:
        await asyncio.gather(*(searcher.search(collection, [one], with_features=False) for one in asked))

    crowd = await median_ms(callers, times=times)
    searcher.close()
    store.close()
    bare_lone, bare_batch = await bare(kind, count, np.stack([one.feature for one in asked]), times)
    print(f"    lone query {lone:.2f} ms, bare {bare_lone:.2f} ms: {lone / bare_lone:.2f}x, {lone - bare_lone:+.2f} ms")
    print(
        f"    batch of {BATCH} {batch / BATCH:.2f} ms each, bare {bare_batch / BATCH:.2f} ms: {batch / bare_batch:.2f}x"
    )
    print(
        f"    {BATCH} callers at once {crowd / BATCH:.2f} ms each: {lone * BATCH / crowd:.1f}x the rate of one by one"
    )


async def bare(kind: Kind, count: int, queries: Feature, times: int) -> tuple[float, float]:
    """Milliseconds of faiss alone: one query, and all."""
    index = (
        faiss.IndexFlatIP(DIM)
        if kind == "flat"
        else faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    )
    for start in range(0, count, PIECE):
        index.add(rows_of(PIECE, start))
    tune(DIM).apply(DIM)

    async def run(asked: Feature) -> None:
        index.search(asked, K)

    return await median_ms(lambda: run(queries[:1]), times=times), await median_ms(lambda: run(queries), times=times)


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
                await measured(path, kind, count)  # type: ignore[arg-type]


if __name__ == "__main__":
    asyncio.run(main())
