"""The asyncio client against a real server: the same calls as the blocking one."""

import asyncio
import inspect

import numpy as np
import pytest
from serving import jpeg

from resight.client import AsyncClient, Client, NewEntry, Query, Where
from resight.errors import EntryNotFoundError, ImageUndecodableError, InputError, UnavailableError


def test_both_clients_have_the_same_methods():
    def public(of: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(getattr(of, name)))
            for name in dir(of)
            if not name.startswith("_") and name != "close"
        }

    blocking, awaiting = public(Client), public(AsyncClient)
    assert set(blocking) == set(awaiting)
    streams = {"stream_embed", "stream_search"}  # these take asynchronous sources too
    assert {name for name in blocking if blocking[name] != awaiting[name]} <= streams
    assert Client.search.__doc__ == AsyncClient.search.__doc__ and "Args" in Client.create_collection.__doc__


def test_every_call_of_the_async_client(address, client, collection):
    async def body():
        async with AsyncClient(address) as own:
            await own.wait_ready(10)
            crops = [NewEntry(jpeg(p, s), f"{p}-{s}", f"p{p}") for p in range(4) for s in range(20)]
            outcomes = await own.enrol_batch(collection, [*crops, NewEntry(b"x")])
            assert isinstance(outcomes[-1], ImageUndecodableError) and len(outcomes) == 81
            answer = await own.search(collection, jpeg(2, 99), top_k=2, group_by="subject", rerank=True)
            assert answer.hits[0].entry.subject_id == "p2" and len(answer.hits) == 2
            listed = [
                entry.entry_id async for entry in own.entries(collection, where=Where(subject_ids=["p1"]), page_size=7)
            ]
            assert listed == [f"1-{s}" for s in range(20)]
            assert collection in [found.name async for found in own.collections()]
            both = await asyncio.gather(*(own.embed(jpeg(p)) for p in range(10)))
            assert np.allclose(both[3], client.embed(jpeg(3)), atol=1e-6)
            with pytest.raises(EntryNotFoundError):
                await own.get_entry(collection, "unknown")
            assert (await own.verify(collection, jpeg(1), jpeg(1, 1))).similarity > 0.9

    asyncio.run(body())


def test_streams_accept_iterables_and_async_iterables(address, collection):
    async def body():
        async with AsyncClient(address) as own:
            await own.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}") for p in range(5)])

            async def later():
                for number in range(40):
                    await asyncio.sleep(0)
                    yield Query(jpeg(number % 5), 1) if number != 9 else Query(jpeg(1), 0)

            found = {number: one async for number, one in own.stream_search(collection, later())}
            assert sorted(found) == list(range(40)) and isinstance(found[9], InputError)
            assert found[13].hits[0].entry.entry_id == "e3"
            features = [one async for one in own.stream_embed([jpeg(1), b"x"])]
            assert sorted(number for number, _ in features) == [0, 1]

    asyncio.run(body())


def test_an_unreachable_server_is_unavailable(address):
    async def body():
        async with AsyncClient("127.0.0.1:1", timeout_s=0.3) as own:
            with pytest.raises(UnavailableError, match="resight serve"):
                await own.info()
            with pytest.raises(UnavailableError, match="became ready"):
                await own.wait_ready(0.2)

    asyncio.run(body())


def test_a_token_is_not_sent_unencrypted():
    with pytest.raises(InputError, match="in plaintext"):
        AsyncClient("192.0.2.1:50051", token="secret")
