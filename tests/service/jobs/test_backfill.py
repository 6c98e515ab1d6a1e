"""Backfill and gate of a migration, on real databases."""

import asyncio

import numpy as np
import pytest
from stores import OTHER, SPACE, create_collection, enrolment, feature, open_gallery

from resight.errors import CropsMissingError
from resight.service.jobs import migration
from resight.service.records import Enrolment, EntryRecord
from resight.service.storage import spaces, writes
from resight.service.storage.writes import add_feature


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def shot(track: int, number: int, noise: float) -> np.ndarray:
    row = feature(track) + noise * feature(1000 + 10 * track + number)
    return (row / np.linalg.norm(row)).astype(np.float32)


@pytest.mark.parametrize("noise, passed", [(0.3, True), (30.0, False)])
@pytest.mark.parametrize("by", ["track", "subject", ""])
def test_the_gate_compares_the_retrieval_of_tracks(store, by, noise, passed):
    async def body():
        lobby = await create_collection(store, keep_crops=True)
        for track in range(20):
            for number in range(3):
                name = {} if not by else {f"{by}_id": f"n{track}"}
                entry = EntryRecord(f"{track}-{number}", **name)
                await store.write(writes.enrol, lobby, Enrolment(entry, shot(track, number, 0.3), (b"crop",)))
        await store.write(migration.begin_backfill, "lobby", OTHER, drop_missing=False)
        keys = await store.read(spaces.entries_without_feature, lobby.key, OTHER.space_id, after=0, limit=99)
        fresh = [(key, shot(number // 3, number % 3, noise)) for number, key in enumerate(keys)]
        assert await store.write(migration.store_features, lobby.key, OTHER.space_id, fresh)
        assert await store.read(migration.backfill_counts, lobby.key, OTHER.space_id) == (60, 60)
        found = await store.read(migration.check_retrieval, lobby.key, SPACE, OTHER)
        assert (found.by, found.searched) == (by, 60 if by else 0)
        assert found.passed == (passed or not by)
        if by:
            assert found.before > 0.9 and (found.after > 0.9) == passed

    asyncio.run(body())


def test_backfill_does_not_touch_existing_features_deleted_entries_and_dropped_spaces(store):
    async def body():
        lobby = await create_collection(store, keep_crops=True)
        for number in range(3):
            await store.write(writes.enrol, lobby, enrolment(number, crops=(b"c",)))
        await store.write(writes.enrol, lobby, enrolment(3))
        with pytest.raises(CropsMissingError, match="1 entries"):
            await store.write(migration.begin_backfill, "lobby", OTHER, drop_missing=False)
        _, total = await store.write(migration.begin_backfill, "lobby", OTHER, drop_missing=True)
        assert total == 4 and await store.read(migration.count_without_crops, lobby.key, OTHER.space_id) == 1
        await store.write(add_feature, 1, OTHER.space_id, feature(50))
        await store.erase(writes.delete_entry, lobby, "e1", allow_missing=True)
        made_now = [(key, feature(60 + key)) for key in (1, 2, 3)]
        assert await store.write(migration.store_features, lobby.key, OTHER.space_id, made_now)
        done = (await store.read(migration.backfill_counts, lobby.key, OTHER.space_id))[1]
        vector = await store.read(
            lambda c: c.execute(
                "SELECT vector FROM feature WHERE entry = 1 AND space_id = ?", (OTHER.space_id,)
            ).fetchone()
        )
        assert done == 2 and vector[0] == feature(50).astype("<f4").tobytes()
        await store.erase(spaces.drop_space, "lobby", OTHER.space_id)
        assert not await store.write(migration.store_features, lobby.key, OTHER.space_id, made_now)
        assert (await store.read(migration.backfill_counts, lobby.key, OTHER.space_id))[1] == 0

    asyncio.run(body())
