-- The tables of schema version 1, as they were released.
PRAGMA journal_mode=WAL;
BEGIN;
PRAGMA application_id=0x52534754;
PRAGMA user_version=1;
CREATE TABLE space (
    space_id TEXT PRIMARY KEY, model_id TEXT NOT NULL, dim INTEGER NOT NULL, created_us INTEGER NOT NULL
) STRICT;
CREATE TABLE collection (
    key INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, space_id TEXT NOT NULL REFERENCES space,
    ttl_us INTEGER, keep_crops INTEGER NOT NULL, revision INTEGER NOT NULL, created_us INTEGER NOT NULL
) STRICT;
-- AUTOINCREMENT: a key is the entry's number in the index and must never mean another entry.
CREATE TABLE entry (
    key INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE,
    entry_id TEXT NOT NULL, subject_id TEXT NOT NULL, camera_id TEXT NOT NULL, track_id TEXT NOT NULL,
    capture_us INTEGER, expire_us INTEGER, quality REAL NOT NULL, shot_count INTEGER NOT NULL,
    created_us INTEGER NOT NULL, UNIQUE (collection, entry_id)
) STRICT;
CREATE INDEX entry_by_key ON entry (collection, key);
CREATE INDEX entry_by_camera ON entry (collection, camera_id, capture_us);
CREATE INDEX entry_by_time ON entry (collection, capture_us);
CREATE INDEX entry_by_subject ON entry (collection, subject_id);
CREATE INDEX entry_by_track ON entry (collection, track_id);
CREATE INDEX entry_by_expiry ON entry (expire_us) WHERE expire_us IS NOT NULL;
CREATE TABLE feature (
    entry INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, space_id TEXT NOT NULL REFERENCES space,
    vector BLOB NOT NULL, crc32 INTEGER NOT NULL, PRIMARY KEY (entry, space_id)
) STRICT;
CREATE TABLE crop (
    entry INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, number INTEGER NOT NULL, image BLOB NOT NULL,
    PRIMARY KEY (entry, number)
) STRICT;
CREATE TABLE label (
    entry INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (entry, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX label_by_value ON label (name, value);
-- The index follows this log; rows it has taken in are removed.
CREATE TABLE change (
    revision INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE,
    entry INTEGER NOT NULL, deleted INTEGER NOT NULL
) STRICT;
CREATE INDEX change_by_collection ON change (collection, revision);
-- A replayed request answers from the entry it made; it must not enrol anew what was deleted since.
CREATE TABLE request (
    request_id TEXT PRIMARY KEY, digest BLOB NOT NULL, collection INTEGER NOT NULL REFERENCES collection
    ON DELETE CASCADE, entry INTEGER REFERENCES entry ON DELETE SET NULL, revision INTEGER NOT NULL,
    at_us INTEGER NOT NULL
) STRICT;
CREATE INDEX request_by_entry ON request (entry);
CREATE INDEX request_by_collection ON request (collection);
CREATE INDEX request_by_time ON request (at_us);
INSERT INTO space VALUES ('abababababababababababababababab', 'tiny', 16, 1);
INSERT INTO collection VALUES (3, 'lobby', 'abababababababababababababababab', NULL, 1, 12, 5);
COMMIT;
