import asyncio

import pytest
from stores import open_gallery

from resight.errors import InputError, NotCancellableError, OperationNotFoundError
from resight.service.storage.operations import NOT_CANCELLABLE_KINDS, Operations, OperationState


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def test_work_is_counted_finished_and_listed_newest_first(store):
    async def body():
        work = Operations(store)
        one = await work.start("migrate", total=10, collection="lobby")
        two = await work.start("snapshot")
        three = await work.start("rebuild")
        await work.progress(one.operation_id, succeeded=4, skipped=1, details={"after": 17})
        going = await work.progress(one.operation_id, succeeded=6, result={"recall_at_10": "0.98"})
        assert (going.state, going.total, going.succeeded, going.skipped) == (OperationState.RUNNING, 10, 6, 1)
        assert going.details == {"collection": "lobby", "after": 17} and going.end_us is None
        done = await work.finish(one.operation_id, result={"space_id": "ab"})
        assert done.state is OperationState.SUCCEEDED and done.result == {"recall_at_10": "0.98", "space_id": "ab"}
        assert done.end_us >= done.start_us
        failed = await work.finish(two.operation_id, error=InputError("no such thing", field="x", limit=3))
        assert failed.state is OperationState.FAILED and isinstance(failed.error, InputError)
        assert (str(failed.error), failed.error.field, failed.error.facts) == ("no such thing", "x", {"limit": "3"})
        assert await work.finish(two.operation_id) == failed
        listed = await work.list_operations(limit=2)
        assert [each.operation_id for each in listed] == [three.operation_id, two.operation_id]
        assert await work.list_operations(before=listed[-1].key) == [done]
        with pytest.raises(OperationNotFoundError, match="ListOperations"):
            await work.get("nothing")

    asyncio.run(body())


def test_a_replay_returns_the_operation_it_started(store):
    async def body():
        work = Operations(store)
        one = await work.start("migrate", request_id="r")
        assert await work.start("migrate", request_id="r") == one
        assert (await work.start("snapshot", request_id="r")).operation_id != one.operation_id
        assert (await work.start("migrate")).operation_id != (await work.start("migrate")).operation_id

    asyncio.run(body())


def test_operations_running_at_a_crash_are_interrupted(tmp_path):
    async def before():
        work = Operations(store)
        running = await work.start("migrate", collection="lobby", after=5)
        done = await work.start("snapshot")
        return running.operation_id, await work.finish(done.operation_id)

    async def after():
        work = Operations(store)
        assert await work.interrupt_unfinished() == 1
        found = await work.get(running)
        assert found.state is OperationState.INTERRUPTED and found.details == {"collection": "lobby", "after": 5}
        assert found.end_us is not None and await work.get(done.operation_id) == done
        assert await work.interrupt_unfinished() == 0

    with open_gallery(tmp_path) as store:
        running, done = asyncio.run(before())
    with open_gallery(tmp_path) as store:
        asyncio.run(after())


def test_an_interrupted_operation_names_the_one_that_continues_it_in_the_same_commit(store):
    """With two commits, a crash in between would leave an interrupted one without a successor."""

    async def body():
        work = Operations(store)
        old = await work.start("migrate", collection="lobby")
        assert await work.interrupt_unfinished() == 1
        commits = store.commits
        new = await work.start("migrate", continues=old.operation_id, collection="lobby")
        assert store.commits == commits + 1
        found = await work.get(old.operation_id)
        assert found.state is OperationState.INTERRUPTED and found.result == {"continued_by": new.operation_id}
        assert new.state is OperationState.RUNNING and new.details == {"collection": "lobby"} and not new.result

    asyncio.run(body())


def test_cancelling_sets_a_flag_that_the_worker_reads(store):
    async def body():
        work = Operations(store)
        one = await work.start("migrate")
        assert (await work.cancel(one.operation_id)).state is OperationState.RUNNING
        assert (await work.progress(one.operation_id, succeeded=1)).cancel_requested
        assert (await work.finish(one.operation_id, cancelled=True)).state is OperationState.CANCELLED
        assert (await work.cancel(one.operation_id)).state is OperationState.CANCELLED

    asyncio.run(body())


@pytest.mark.parametrize("kind", NOT_CANCELLABLE_KINDS)
def test_operations_that_cannot_be_cancelled_say_so_until_they_end(store, kind):
    async def body():
        work = Operations(store)
        begun = await work.start(kind)
        with pytest.raises(NotCancellableError, match=f"{kind}, which cannot be cancelled"):
            await work.cancel(begun.operation_id)
        assert await work.get(begun.operation_id) == begun
        done = await work.finish(begun.operation_id)
        assert await work.cancel(begun.operation_id) == done

    asyncio.run(body())
