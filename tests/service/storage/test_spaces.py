import asyncio
from dataclasses import replace

import numpy as np
import pytest
from stores import DIM, OTHER, SPACE, create_collection, enrolment, feature, files_with, open_gallery

from resight.calibration import Calibration
from resight.errors import ConflictError, InputError, SpaceMismatchError
from resight.service.storage import reads, spaces, writes
from resight.service.storage.schema import connect
from resight.service.storage.writes import add_feature

CALIBRATION = Calibration(**{
    "slope": 12.0, "midpoint": 0.5, "accept": 0.9, "reject": 0.2, "false_accept_share": 0.01,
    "false_reject_share": 0.05, "positives": 100, "negatives": 200, "positive_source": "tracks",
    "negative_source": "cameras", "error": 0.03,
})  # fmt: skip


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def test_a_space_keeps_its_newest_calibration(store):
    async def body():
        newer = replace(SPACE, calibration=CALIBRATION, model_version="2026-01-01")
        lobby = await create_collection(store)
        assert lobby.space.calibration is None
        await store.write(writes.save_space, newer)
        assert (await store.read(reads.collection, "lobby")).space == newer
        await store.write(writes.save_space, replace(newer, calibration=None))
        assert (await store.read(reads.collection, "lobby")).space == newer
        await store.write(lambda c: c.execute("UPDATE space SET calibration = '{\"knots\": 3}'"))
        assert (await store.read(reads.collection, "lobby")).space.calibration is None

    asyncio.run(body())


def test_a_collection_moves_to_another_space_and_back(store):
    async def body():
        lobby = await create_collection(store, keep_crops=True)
        for number in range(3):
            await store.write(writes.enrol, lobby, enrolment(number, crops=(b"c%d" % number,)))
        both = await store.write(spaces.begin_space, "lobby", OTHER)
        assert both.other_space_ids == (OTHER.space_id,) and both.space == SPACE
        new = enrolment(7, others=((OTHER.space_id, feature(107)),))
        await store.write(writes.enrol, both, new)
        lacking = await store.read(spaces.entries_without_feature, lobby.key, OTHER.space_id, after=0, limit=9)
        assert lacking == [1, 2, 3]
        assert await store.read(spaces.crops_of_entries, lacking) == {1: (b"c0",), 2: (b"c1",), 3: (b"c2",)}
        switch = {"expected": SPACE.space_id}
        with pytest.raises(SpaceMismatchError, match="3 entries"):
            await store.write(spaces.activate_space, "lobby", OTHER.space_id, **switch)
        for key in lacking:
            await store.write(add_feature, key, OTHER.space_id, feature(100 + key))
        await store.write(spaces.mark_space_ready, lobby, OTHER.space_id)
        assert [(one.state, one.entries) for one in await store.read(spaces.collection_spaces, lobby.key)] == [
            ("active", 4),
            ("ready", 4),
        ]
        with pytest.raises(ConflictError):
            await store.write(spaces.activate_space, "lobby", OTHER.space_id, expected="ff")
        now = await store.write(spaces.activate_space, "lobby", OTHER.space_id, **switch)
        assert (now.space, now.previous_space_id, now.other_space_ids) == (OTHER, SPACE.space_id, (SPACE.space_id,))
        assert now.revision > both.revision and now.etag != both.etag
        change = await store.read(reads.changes_since, now.key, now.space, -1)
        assert np.array_equal(change.features[3], feature(107))
        with pytest.raises(ConflictError, match="switched"):
            await store.write(writes.enrol, lobby, enrolment(8))  # embedded before the switch, with one model only
        await store.write(writes.enrol, both, enrolment(9, others=((OTHER.space_id, feature(109)),)))
        with pytest.raises(SpaceMismatchError, match="searched"):
            await store.erase(spaces.drop_space, "lobby", OTHER.space_id)
        back = await store.write(spaces.activate_space, "lobby", SPACE.space_id, expected=OTHER.space_id)
        assert (back.space, back.previous_space_id) == (SPACE, OTHER.space_id)

    asyncio.run(body())


def test_a_dropped_space_leaves_no_byte(store, tmp_path):
    async def body():
        lobby = await create_collection(store)
        with pytest.raises(InputError, match="already"):
            await store.write(spaces.begin_space, "lobby", SPACE)
        both = await store.write(spaces.begin_space, "lobby", OTHER)
        for number in range(40):
            one = enrolment(number, others=((OTHER.space_id, feature(100 + number)),))
            await store.write(writes.enrol, both, one)
        assert files_with(tmp_path, feature(120).tobytes())
        assert await store.erase(spaces.drop_space, "lobby", OTHER.space_id) == 40
        assert not any(files_with(tmp_path, feature(100 + number).tobytes()) for number in range(40))
        assert (await store.read(reads.collection, "lobby")).other_space_ids == ()
        assert await store.read(spaces.spaces_retired_before, 1 << 60) == []
        late = enrolment(77, others=((OTHER.space_id, feature(177)),))  # embedded before the space was dropped
        await store.write(writes.enrol, both, late)
        assert not files_with(tmp_path, feature(177).tobytes()) and files_with(tmp_path, feature(77).tobytes())
        with pytest.raises(SpaceMismatchError, match="migrate"):
            await store.write(spaces.activate_space, "lobby", OTHER.space_id, expected="")
        assert lobby.key == both.key and DIM == OTHER.dim

    asyncio.run(body())


def test_a_retired_space_is_purged_after_its_time(store):
    async def body():
        await create_collection(store)
        await store.write(spaces.begin_space, "lobby", OTHER)
        await store.write(spaces.activate_space, "lobby", OTHER.space_id, expected="")
        assert await store.read(spaces.spaces_retired_before, 0) == []
        assert await store.read(spaces.spaces_retired_before, 1 << 60) == [("lobby", SPACE.space_id)]
        await store.write(spaces.begin_space, "lobby", SPACE)  # a migration uses it again before it is dropped
        assert await store.erase(spaces.drop_retired_space, "lobby", SPACE.space_id, 1 << 60) == 0
        assert (await store.read(reads.collection, "lobby")).other_space_ids == (SPACE.space_id,)

    asyncio.run(body())


def test_a_space_that_was_never_activated_is_purged_after_a_week(store):
    async def body():
        lobby = await create_collection(store)
        for state in ("building", "ready"):
            await store.write(spaces.begin_space, "lobby", OTHER)
            if state == "ready":
                await store.write(spaces.mark_space_ready, lobby, OTHER.space_id)
            assert await store.read(spaces.spaces_retired_before, 1 << 60) == []  # even with no retention
            await store.write(lambda c: c.execute("UPDATE collection_space SET since_us = since_us - 8 * 86400000000"))
            assert await store.read(spaces.spaces_retired_before, 1 << 60) == [("lobby", OTHER.space_id)]
            assert await store.read(spaces.spaces_retired_before, 1) == []  # nor with a longer retention
            await store.erase(spaces.drop_retired_space, "lobby", OTHER.space_id, 1 << 60)
            assert (await store.read(reads.collection, "lobby")).other_space_ids == ()

    asyncio.run(body())


def test_reader_connections_cannot_write(store):
    with pytest.raises(Exception, match="readonly"):
        connect(store.path, read_only=True).execute("DELETE FROM entry")
