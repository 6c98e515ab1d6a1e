"""Links between crops: the file format, invalid files, and contradictions between chains."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from references_links import contradicted, link_groups

from resight.errors import StoreError
from resight.training.store.crops import CropStore
from resight.training.store.links import (
    LINKS_FILE,
    SCHEMA,
    LinkPair,
    Links,
    links_of,
    read_links,
    write_links,
)


def rows(root: Path, count: int) -> CropStore:
    """A store without files: links never open a crop."""
    unknown = np.full(count, -1)
    paths = tuple(f"crops/{number:03d}.jpg" for number in range(count))
    return CropStore(root, paths, np.zeros(count, np.int64), ("c",), np.full(count, np.nan), unknown, unknown)


def pair(one: int, other: int, same: bool) -> tuple[str, str, bool]:
    return f"crops/{one:03d}.jpg", f"crops/{other:03d}.jpg", same


def test_written_pairs_are_read_without_duplicates(tmp_path: Path) -> None:
    write_links(tmp_path, [pair(0, 1, True), pair(5, 2, False), pair(1, 0, True), pair(0, 1, True)])
    assert read_links(tmp_path) == [LinkPair(*pair(0, 1, True)), LinkPair(*pair(5, 2, False))]
    assert pq.read_table(tmp_path / LINKS_FILE).schema.equals(SCHEMA, check_metadata=True)
    write_links(tmp_path, [])
    assert read_links(tmp_path) == [] and [file.name for file in tmp_path.iterdir()] == [LINKS_FILE]


def test_a_store_without_the_file_has_no_links(tmp_path: Path) -> None:
    assert read_links(tmp_path) == []
    found = links_of(rows(tmp_path, 4))
    assert (len(found), found.absent, found.refuted) == (0, 0, 0)
    assert found.groups(4).tolist() == [0, 1, 2, 3]


def test_paths_become_rows_of_a_part_of_the_store(tmp_path: Path) -> None:
    write_links(tmp_path, [pair(6, 2, True), pair(4, 6, False), pair(6, 99, True), pair(1, 2, False)])
    found = links_of(rows(tmp_path, 8).subset([6, 4, 2]))
    assert found.rows.tolist() == [[0, 2], [1, 0]] and found.same.tolist() == [True, False] and found.absent == 2
    assert (found.rows.dtype, found.same.dtype) == (np.dtype(np.int64), np.dtype(bool))


@pytest.mark.parametrize(
    "bad, message",
    [
        ([pair(0, 1, True), pair(1, 0, False)], "both as one person and as two persons"),
        ([pair(3, 3, True)], "with itself"),
        ([("../x.jpg", "a.jpg", True)], "leaves the store"),
        ([("a.jpg", "/etc/passwd", True)], "leaves the store"),
    ],
)
def test_invalid_pairs_are_refused_by_writer_and_reader(
    tmp_path: Path, bad: list[tuple[str, str, bool]], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        write_links(tmp_path, bad)
    assert not list(tmp_path.iterdir())
    columns = dict(zip(SCHEMA.names, map(list, zip(*bad, strict=True)), strict=True))
    pq.write_table(pa.table(columns, schema=SCHEMA), tmp_path / LINKS_FILE)
    with pytest.raises(StoreError, match=message):
        read_links(tmp_path)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_wrong_columns_are_refused(tmp_path: Path, name: str) -> None:
    write_links(tmp_path, [pair(0, 1, True)])
    table = pq.read_table(tmp_path / LINKS_FILE)
    at = table.schema.get_field_index(name)
    for column, message in (
        (pa.array([7]), f"column {name} must be .* found int64"),
        (None, f"lacks the columns {name}"),
    ):
        changed = table.remove_column(at) if column is None else table.set_column(at, name, column)
        pq.write_table(changed, tmp_path / LINKS_FILE)
        with pytest.raises(StoreError, match=message):
            read_links(tmp_path)


def test_versions_damage_and_nulls_are_refused(tmp_path: Path) -> None:
    write_links(tmp_path, [pair(0, 1, True)])
    good, table = (tmp_path / LINKS_FILE).read_bytes(), pq.read_table(tmp_path / LINKS_FILE)
    pq.write_table(table.replace_schema_metadata({b"resight.links.schema_version": b"2"}), tmp_path / LINKS_FILE)
    with pytest.raises(StoreError, match="schema version 2, this program reads 1"):
        read_links(tmp_path)
    pq.write_table(table.set_column(2, "same", pa.array([None], pa.bool_())), tmp_path / LINKS_FILE)
    with pytest.raises(StoreError, match="bool without nulls"):
        read_links(tmp_path)
    (tmp_path / LINKS_FILE).write_bytes(good[: len(good) // 2])
    with pytest.raises(StoreError, match=r"is damaged .* write the links again"):
        read_links(tmp_path)


def test_a_chain_contradicted_by_a_rejection_is_omitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The chain 0-1-2 contradicts the rejected pair (0, 2); 2-3 and 5-6 are independent."""
    pairs = [pair(0, 1, True), pair(1, 2, True), pair(2, 3, True), pair(0, 2, False), pair(5, 6, True)]
    write_links(tmp_path, pairs)
    with caplog.at_level(logging.WARNING):
        found = links_of(rows(tmp_path, 8))
    assert found.rows.tolist() == [[2, 3], [0, 2], [5, 6]] and found.refuted == 2
    assert "omitted 2 confirmed pairs" in caplog.text and "crops/000.jpg" in caplog.text


@pytest.mark.parametrize("seed", range(30))
def test_groups_equal_the_loop_implementation_and_are_free_of_contradictions(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 30))
    decisions = {}
    for one, other in rng.integers(0, count, (int(rng.integers(1, 40)), 2)):
        if one != other:
            decisions[min(one, other), max(one, other)] = bool(rng.random() < 0.6)
    write_links(tmp_path, [pair(one, other, same) for (one, other), same in decisions.items()])
    found = links_of(rows(tmp_path, count))
    kept = [(int(a), int(b), bool(same)) for (a, b), same in zip(found.rows, found.same, strict=True)]
    assert found.groups(count).tolist() == link_groups(kept, count)
    assert not contradicted(kept, count)
    whole = [(a, b, same) for (a, b), same in decisions.items()]
    assert len(kept) + found.refuted == len(whole)
    assert [link for link in whole if not link[2]] == [link for link in kept if not link[2]]
    suspects = contradicted(whole, count)  # groups with a contradiction; all other pairs are kept
    group = link_groups(whole, count)
    assert [link for link in whole if link[2] and group[link[0]] not in suspects] == [
        link for link in kept if link[2] and group[link[0]] not in suspects
    ]


def test_different_lengths_are_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        Links(np.zeros((2, 2), np.int64), np.array([True]))
