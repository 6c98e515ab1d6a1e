"""The search queue: batching, a result for each caller, and no endless waiting."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from resight.errors import DrainingError
from resight.service.search.searcher import MAX_BATCH, SearchQueue

FOREVER = float("inf")


class Doubled:
    """Doubles numbers, and records the batches."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, list[int]]] = []

    def __call__(self, kind, jobs):
        self.runs.append((kind, list(jobs)))
        if kind == "broken":
            raise ValueError("a damaged index")
        return [2 * job for job in jobs]


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as made:
        yield made


def test_jobs_of_one_loop_iteration_are_one_run(thread):
    run = Doubled()
    queue = SearchQueue(thread, run, max_queries=1000)

    async def body():
        return await asyncio.gather(*(queue.submit("k", [number, -number], deadline=FOREVER) for number in range(20)))

    assert asyncio.run(body()) == [[2 * number, -2 * number] for number in range(20)]
    assert [len(jobs) for _, jobs in run.runs] == [40] and queue.waiting == 0


def test_large_batches_are_split_and_kinds_are_not_mixed(thread):
    run = Doubled()
    queue = SearchQueue(thread, run, max_queries=1000)
    kinds = ["even" if number % 2 else "odd" for number in range(300)]

    async def body():
        return await asyncio.gather(
            *(queue.submit(kind, [number], deadline=FOREVER) for number, kind in enumerate(kinds))
        )

    assert asyncio.run(body()) == [[2 * number] for number in range(300)]
    assert all(kinds[number] == kind for kind, jobs in run.runs for number in jobs)
    assert len(run.runs) == 2 * -(-300 // MAX_BATCH)


def test_a_failing_run_fails_only_its_kind(thread):
    queue = SearchQueue(thread, Doubled(), max_queries=1000)

    async def body():
        kinds = ("broken", "sound", "broken")
        return await asyncio.gather(*(queue.submit(k, [1], deadline=FOREVER) for k in kinds), return_exceptions=True)

    first, second, third = asyncio.run(body())
    assert isinstance(first, ValueError) and second == [2] and isinstance(third, ValueError)


def test_one_queue_serves_successive_event_loops(thread):
    queue = SearchQueue(thread, Doubled(), max_queries=1000)

    async def left() -> None:
        asyncio.get_running_loop().create_task(queue.submit("k", [1], deadline=FOREVER))
        await asyncio.sleep(0)  # queued, but the loop ends before the run is scheduled

    for _ in range(3):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(_cancelled(left()))
        assert asyncio.run(queue.submit("k", [21], deadline=FOREVER)) == [42]
    assert queue.waiting == 0


async def _cancelled(work) -> None:
    await work
    raise asyncio.CancelledError


def test_jobs_after_shutdown_are_refused():
    thread = ThreadPoolExecutor(1)
    queue = SearchQueue(thread, Doubled(), max_queries=1000)
    thread.shutdown()
    with pytest.raises(DrainingError):
        asyncio.run(queue.submit("k", [1], deadline=FOREVER))
