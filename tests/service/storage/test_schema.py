import asyncio
import sqlite3
import zlib
from pathlib import Path

import numpy as np
import pytest
from stores import DIM, SPACE, feature

from resight.errors import StoreError
from resight.service.records import Enrolment, EntryRecord, Filter, now_us
from resight.service.storage import reads, writes
from resight.service.storage.schema import APPLICATION_ID, BOOKKEEPING_TABLES, CORE_TABLES, SCHEMA_VERSION, UPGRADES
from resight.service.storage.store import Store

OLD = (Path(__file__).parent / "schema_v1.sql").read_text()


def old_file(path: Path, entries: int = 5) -> None:
    """A database as written by version 1, with entries."""
    raw = sqlite3.connect(path)
    raw.executescript(OLD)
    for number in range(1, entries + 1):
        vector = feature(number).tobytes()
        raw.execute(
            "INSERT INTO entry VALUES (?, 3, ?, ?, '', '', NULL, NULL, 0.5, 1, 7)", (number, f"e{number}", f"s{number}")
        )
        raw.execute("INSERT INTO feature VALUES (?, ?, ?, ?)", (number, SPACE.space_id, vector, zlib.crc32(vector)))
        raw.execute("INSERT INTO crop VALUES (?, 0, ?)", (number, b"jpeg"))
        raw.execute("INSERT INTO label VALUES (?, 'hat', 'red')", (number,))
        raw.execute("INSERT INTO change VALUES (?, 3, ?, 0)", (number, number))
    raw.execute("INSERT INTO request VALUES ('r1', x'64', 3, 1, 1, ?)", (now_us(),))
    raw.commit()
    raw.close()


def shape(path: Path) -> dict[str, object]:
    """Every table's columns, every index and trigger: equal in all files of one version."""
    raw = sqlite3.connect(path)
    named = raw.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name").fetchall()
    columns = {
        table: raw.execute("SELECT * FROM pragma_table_info(?)", (table,)).fetchall()
        for kind, table, *_ in named
        if kind == "table"
    }
    keys = {table: raw.execute("SELECT * FROM pragma_foreign_key_list(?)", (table,)).fetchall() for table in columns}
    others = [(kind, name, of, " ".join((sql or "").split())) for kind, name, of, sql in named if kind != "table"]
    raw.close()
    return {
        "columns": columns,
        "keys": {table: sorted(rows, key=str) for table, rows in keys.items()},
        "others": others,
    }


def without_order(shaped: dict[str, object]) -> dict[str, object]:
    """Foreign keys without their numbers, which depend on the order of creation only."""
    keys = {table: sorted(row[2:] for row in rows) for table, rows in shaped["keys"].items()}
    return shaped | {"keys": keys}


def test_an_upgraded_file_has_the_tables_of_a_new_one(tmp_path):
    old_file(tmp_path / "old")
    Store(tmp_path / "old", dim=DIM).close()
    Store(tmp_path / "new", dim=DIM).close()
    assert without_order(shape(tmp_path / "old")) == without_order(shape(tmp_path / "new"))


def test_each_intermediate_version_is_upgraded(tmp_path):
    """A database as written by version 2: a new one without the tables added later."""
    raw = sqlite3.connect(tmp_path / "two")
    raw.executescript(
        f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version=2; {CORE_TABLES} {BOOKKEEPING_TABLES}"
    )
    raw.close()
    for name in ("two", "new"):
        Store(tmp_path / name, dim=DIM).close()
    assert shape(tmp_path / "two") == shape(tmp_path / "new")


def test_an_upgraded_file_keeps_its_content_and_accepts_writes(tmp_path):
    old_file(tmp_path / "g")

    async def body():
        lobby = await store.read(reads.collection, "lobby")
        assert (lobby.key, lobby.revision, lobby.max_entries, lobby.space) == (3, 12, 0, SPACE)
        assert await store.read(reads.count, lobby.key, Filter()) == 5
        key, entry = await store.read(reads.entry, lobby, "e4")
        assert (key, entry.subject_id, entry.labels) == (4, "s4", {"hat": "red"})
        assert np.array_equal(await store.read(reads.feature, 4, SPACE), feature(4))
        again = await store.write(
            writes.enrol, lobby, Enrolment(EntryRecord("x"), feature(1), request_id="r1", digest=b"d")
        )
        assert again.replayed and again.entry.entry_id == "e1"
        new = await store.write(writes.enrol, lobby, Enrolment(EntryRecord("e6"), feature(6)))
        assert new.revision > 5
        held = await store.read(lambda c: c.execute("SELECT held FROM collection").fetchall())
        spaces = await store.read(lambda c: c.execute("SELECT collection, state FROM collection_space").fetchall())
        assert (held, spaces) == ([(6,)], [(3, "active")])

    store = Store(tmp_path / "g", dim=DIM)
    try:
        asyncio.run(body())
    finally:
        store.close()


def test_a_failed_upgrade_leaves_the_old_file(tmp_path, monkeypatch):
    old_file(tmp_path / "g")
    before = shape(tmp_path / "g")
    monkeypatch.setitem(UPGRADES, 2, UPGRADES[2] + "INSERT INTO nowhere VALUES (1);")
    with pytest.raises(StoreError):
        Store(tmp_path / "g", dim=DIM)
    assert shape(tmp_path / "g") == before
    monkeypatch.undo()
    Store(tmp_path / "g", dim=DIM).close()
    raw = sqlite3.connect(tmp_path / "g")
    assert raw.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    raw.close()
