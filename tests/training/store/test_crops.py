import io
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resight.errors import SiteError, StoreError
from resight.image import decode
from resight.training.store.crops import (
    INDEX_FILE,
    SCHEMA,
    UNKNOWN,
    VERSION_KEY,
    CropStore,
    check_crops,
    is_store,
    open_store,
    usable_crops,
    write_store,
)


def save(path: Path, seed: int = 0, size: tuple[int, int] = (32, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def make(root: Path, names: Sequence[str] = ("a.jpg", "b/c.jpg", "d.jpg", "e.jpg")) -> CropStore:
    """A store of crops whose rows all differ."""
    for seed, name in enumerate(names):
        save(root / name, seed)
    count = len(names)
    return CropStore(
        root,
        tuple(names),
        np.arange(count) % 3,
        ("gate", "c2", "c10"),
        np.array([0.5, math.nan, 12.25, 1e9][:count]),
        np.array([7, UNKNOWN, 7, 8][:count]),
        np.array([0, 5, UNKNOWN, 9_999_999_999][:count]),
    )


def rewrite(root: Path, change: dict[str, pa.Array], *, metadata: dict[bytes, bytes] | None = None) -> None:
    """Replace columns of an index directly in the file."""
    table = pq.read_table(root / INDEX_FILE)
    old_metadata = table.schema.metadata
    for name, column in change.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table.replace_schema_metadata(old_metadata if metadata is None else metadata), root / INDEX_FILE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_store(tmp_path, make(tmp_path), ["train", "query", "gallery", "train"])
    return tmp_path


def test_a_written_store_is_read_in_order(root: Path) -> None:
    splits = open_store(root)
    train, query, gallery = splits["train"], splits["query"], splits["gallery"]
    assert is_store(root) and list(splits) == ["train", "query", "gallery"]
    assert train.paths == ("a.jpg", "e.jpg") and query.paths == ("b/c.jpg",) and gallery.paths == ("d.jpg",)
    assert train.camera_names == query.camera_names == gallery.camera_names == ("c2", "c10", "gate")
    assert [train.camera_names[camera] for camera in train.cameras] == ["gate", "gate"]
    assert [query.camera_names[query.cameras[0]], gallery.camera_names[gallery.cameras[0]]] == ["c2", "c10"]
    assert train.times_s.tolist() == [0.5, 1e9] and math.isnan(query.times_s[0])
    assert train.tracks.tolist() == [7, 8] and query.tracks.tolist() == [UNKNOWN]
    assert train.persons.tolist() == [0, 9_999_999_999] and gallery.persons.tolist() == [UNKNOWN]
    assert {array.dtype for array in (train.cameras, train.tracks, train.persons)} == {np.dtype(np.int64)}
    assert train.has_persons and not gallery.has_persons
    assert decode(train.read(1)).shape == (64, 32, 3)


def test_the_index_has_the_published_schema(root: Path) -> None:
    table = pq.read_table(root / INDEX_FILE)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert (
        table.column("time_s").null_count == table.column("track").null_count == table.column("person").null_count == 1
    )


def test_an_index_made_with_pyarrow_alone_is_read(tmp_path: Path) -> None:
    save(tmp_path / "cam1" / "1.jpg")
    rows = {
        "path": ["cam1/1.jpg"],
        "camera": ["cam1"],
        "time_s": [None],
        "track": [3],
        "person": [-1],
        "split": ["train"],
    }
    pq.write_table(pa.table(rows, schema=SCHEMA), tmp_path / INDEX_FILE)
    store = open_store(tmp_path)["train"]
    assert store.tracks.tolist() == [3] and store.persons.tolist() == [UNKNOWN] and math.isnan(store.times_s[0])


def test_a_subset_keeps_order_repeats_and_camera_numbers(tmp_path: Path) -> None:
    store = make(tmp_path)
    part = store.subset([3, 1, 1])
    assert part.paths == ("e.jpg", "b/c.jpg", "b/c.jpg") and part.cameras.tolist() == [0, 1, 1]
    assert part.camera_names == store.camera_names and part.tracks.tolist() == [8, UNKNOWN, UNKNOWN]
    assert part.read(0) == store.read(3)
    assert len(store.subset([])) == 0 and not store.subset([]).has_persons


def test_the_fingerprint_depends_on_content_and_not_on_the_folder(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(root, copy)
    store = open_store(root)["train"]
    assert open_store(copy)["train"].fingerprint == store.fingerprint
    same_size = bytearray((copy / "a.jpg").read_bytes())
    same_size[-10] ^= 1
    (copy / "a.jpg").write_bytes(bytes(same_size))
    assert open_store(copy)["train"].fingerprint != store.fingerprint
    others = [
        store.subset([1, 0]),
        store.subset([0]),
        replace(store, persons=np.array([1, 2])),
        replace(store, tracks=np.array([1, 2])),
        replace(store, times_s=np.array([1.0, 2.0])),
        replace(store, camera_names=("c2", "c10", "door")),
    ]
    assert len({other.fingerprint for other in [store, *others]}) == 7


def test_a_new_index_replaces_the_old_one_and_leaves_nothing_else(root: Path) -> None:
    before = sorted(path.name for path in root.iterdir())
    write_store(root, make(root).subset([1]), ["train"])
    assert list(open_store(root)) == ["train"] and sorted(path.name for path in root.iterdir()) == before


@pytest.mark.parametrize("splits", [["train"] * 3, ["train", "train", "train", "test"], []])
def test_writing_refuses_unknown_splits(tmp_path: Path, splits: list[str]) -> None:
    with pytest.raises(StoreError, match="expected one of train, query, gallery for each of 4"):
        write_store(tmp_path, make(tmp_path), splits)
    assert not is_store(tmp_path)


def test_a_crop_listed_twice_is_refused_by_writer_and_reader(root: Path) -> None:
    with pytest.raises(StoreError, match=r"lists a\.jpg twice"):
        write_store(root, make(root).subset([0, 0]), ["train", "query"])
    rewrite(root, {"path": pa.array(["a.jpg", "d.jpg", "e.jpg", "a.jpg"])})
    with pytest.raises(StoreError, match=r"lists a\.jpg twice"):
        open_store(root)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a.jpg", "b/../../a.jpg", "", ".", "b\\a.jpg", "a\0.jpg", "\udcff.jpg"]
)
def test_paths_out_of_the_store_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(StoreError, match=r"leaves the store|not UTF-8"):
        replace(make(tmp_path), paths=("a.jpg", "b/c.jpg", "d.jpg", path))


@pytest.mark.parametrize("path", ["../a.jpg", "/etc/passwd"])
def test_paths_out_of_the_store_are_refused_in_an_index(root: Path, path: str) -> None:
    rewrite(root, {"path": pa.array(["a.jpg", "b/c.jpg", "d.jpg", path])})
    with pytest.raises(StoreError, match="leaves the store"):
        open_store(root)


@pytest.mark.parametrize(
    "change",
    [
        {"cameras": np.array([0, 1, 2, 3])},
        {"cameras": np.array([0, 1, 2, -1])},
        {"cameras": np.array([0])},
        {"tracks": np.array([0, 0, 0, -2])},
        {"persons": np.array([0, 0, 0, -2])},
        {"times_s": np.array([0, 0, 0, math.inf])},
        {"paths": ("a.jpg",)},
    ],
)
def test_invalid_columns_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        replace(make(tmp_path), **change)


@pytest.mark.parametrize("version", [b"2", b"", b"one", None])
def test_another_schema_version_is_refused(root: Path, version: bytes | None) -> None:
    rewrite(root, {}, metadata={b"other": b"1"} if version is None else {VERSION_KEY: version})
    with pytest.raises(StoreError, match="this program reads 1"):
        open_store(root)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_a_missing_column_is_named(root: Path, name: str) -> None:
    table = pq.read_table(root / INDEX_FILE)
    pq.write_table(table.drop_columns([name]), root / INDEX_FILE)
    with pytest.raises(StoreError, match=f"lacks the columns {name}"):
        open_store(root)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_a_column_of_another_type_is_named(root: Path, name: str) -> None:
    rewrite(root, {name: pa.array([True] * 4)})
    with pytest.raises(StoreError, match=f"column {name} must be .* found bool"):
        open_store(root)


@pytest.mark.parametrize("name", ["path", "camera", "split"])
def test_a_null_in_a_required_column_is_refused(root: Path, name: str) -> None:
    rewrite(root, {name: pa.array(["train", "train", "train", None])})
    with pytest.raises(StoreError, match=f"column {name} must be string without nulls.*1 nulls"):
        open_store(root)


def test_an_unknown_split_is_named(root: Path) -> None:
    rewrite(root, {"split": pa.array(["train", "validation", "train", "query"])})
    with pytest.raises(StoreError, match=r"validation.*expected train, query, gallery"):
        open_store(root)


def test_additional_columns_are_ignored(root: Path) -> None:
    table = pq.read_table(root / INDEX_FILE)
    pq.write_table(table.append_column("note", pa.array(["x"] * 4)), root / INDEX_FILE)
    assert len(open_store(root)["train"]) == 2


def test_damage_is_refused_and_never_another_error(root: Path) -> None:
    good = (root / INDEX_FILE).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= int(rng.integers(1, 256))
        (root / INDEX_FILE).write_bytes(bytes(bad))
        try:
            open_store(root)  # some bytes of Parquet's footer are not read
        except StoreError:
            refused += 1
    assert refused > 75
    for content in (b"", b"PAR1", good[:-1], good[: len(good) // 2], b"no parquet at all" * 50):
        (root / INDEX_FILE).write_bytes(content)
        with pytest.raises(StoreError, match=r"is damaged .* rebuild the index"):
            open_store(root)


def test_a_folder_without_index_is_no_store(tmp_path: Path) -> None:
    assert not is_store(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"is not a crop store: index\.parquet is missing"):
            open_store(folder)


def test_a_missing_crop_is_named_when_read(root: Path) -> None:
    (root / "a.jpg").unlink()
    store = open_store(root)["train"]
    with pytest.raises(StoreError, match=r"a\.jpg cannot be read \(No such file"):
        store.read(0)
    with pytest.raises(StoreError, match=r"a\.jpg"):
        _ = store.fingerprint


def test_links_out_of_the_store_are_refused_links_within_are_read(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    save(outside / "c.jpg")
    store = open_store(root)
    inside = (root / "d.jpg").read_bytes()
    (root / "a.jpg").unlink()
    (root / "a.jpg").symlink_to(outside / "c.jpg")
    shutil.rmtree(root / "b")
    (root / "b").symlink_to(outside)
    (root / "e.jpg").unlink()
    (root / "e.jpg").symlink_to("d.jpg")
    with pytest.raises(StoreError, match="link that leaves the store"):
        store["train"].read(0)
    with pytest.raises(StoreError, match="link that leaves the store"):
        store["query"].read(0)
    assert store["train"].read(1) == inside


def test_a_store_may_itself_be_reached_by_a_link(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("links") / "site"
    link.symlink_to(root)
    assert open_store(link)["train"].read(0) == (root / "a.jpg").read_bytes()


def test_files_that_are_not_regular_are_refused(root: Path) -> None:
    store = open_store(root)["train"]
    (root / "a.jpg").unlink()
    os.mkfifo(root / "a.jpg")
    (root / "e.jpg").unlink()
    (root / "e.jpg").mkdir()
    for row in (0, 1):
        with pytest.raises(StoreError, match="not a regular file"):
            store.read(row)
    (root / "a.jpg").unlink()
    (root / "a.jpg").symlink_to("a.jpg")
    with pytest.raises(StoreError, match="cannot be read"):
        store.read(0)


BAD = ("corrupt.jpg", "truncated.jpg", "text.jpg", "tiny.jpg", "huge.jpg", "missing.jpg", "fat.jpg")
REASONS = (
    "cannot be decoded",
    "cannot be decoded",
    "cannot be decoded",
    "1x1 pixels, a side needs at least 16",
    "9000x9000 pixels",
    "cannot be read",
    "at most 2097152",
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> CropStore:
    """Good crops and bad ones of every kind."""
    root = tmp_path_factory.mktemp("damaged")
    save(root / "good0.jpg", 1)
    save(root / "good1.jpg", 2)
    whole = (root / "good0.jpg").read_bytes()
    (root / "corrupt.jpg").write_bytes(whole[:30] + bytes(len(whole) - 30))
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.jpg").write_text("a shopping list")
    save(root / "tiny.jpg", size=(1, 1))
    buffer = io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(buffer, "JPEG", quality=1)
    (root / "huge.jpg").write_bytes(buffer.getvalue())
    (root / "fat.jpg").write_bytes(whole + bytes(2 * 1024 * 1024))
    names = ("good0.jpg", *BAD, "good1.jpg")
    unknown = np.full(len(names), UNKNOWN)
    return CropStore(root, names, np.zeros(len(names), np.int64), ("c",), np.full(len(names), np.nan), unknown, unknown)


def test_every_unusable_crop_is_reported_with_its_reason(damaged: CropStore) -> None:
    done: list[int] = []
    found = check_crops(damaged, progress=done.append)
    assert list(found) == list(range(1, 1 + len(BAD))) and sum(done) == len(damaged)
    for reason, expected in zip(found.values(), REASONS, strict=True):
        assert expected in reason


def test_unusable_crops_are_skipped_and_logged(damaged: CropStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        left = usable_crops(damaged)
    assert left.paths == ("good0.jpg", "good1.jpg")
    assert len(caplog.records) == len(BAD)
    for record, name, reason in zip(caplog.records, BAD, REASONS, strict=True):
        assert name in record.getMessage() and reason in record.getMessage()


def test_a_valid_store_is_unchanged_and_nothing_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(root)["train"]
    assert usable_crops(store).paths == store.paths and not caplog.records


def test_nothing_usable_is_an_error(damaged: CropStore) -> None:
    with pytest.raises(SiteError, match=r"none of the 7 crops .* expected JPEG, PNG or WebP"):
        usable_crops(damaged.subset(range(1, 8)))
    with pytest.raises(SiteError, match="none of the 0 crops"):
        usable_crops(damaged.subset([]))
