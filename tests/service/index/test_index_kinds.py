"""The parts below the searcher: index policy, saved graphs, filters, tuning, the GPU's call sequence."""

from functools import partial

import faiss
import numpy as np
import pytest

from resight.errors import StartupError
from resight.service.index.base import IndexPolicy, applies_filter, best_candidates, check_filters
from resight.service.index.builder import check_index_filters
from resight.service.index.flat import tune_faiss
from resight.service.index.graph import GRAPH_FOLDER, GraphFiles, GraphIndex, GraphSegment, empty_graph
from resight.service.index.half import MIN_BLOCK_QUERIES, ROUNDING, GpuScan, HalfIndex, open_gpu
from resight.service.records import Collection, Space

DIM = 24
SPACE = Space("ab" * 16, "tiny", DIM)
LOBBY = Collection("lobby", SPACE, key=3)


def unit(count, seed=0, dim=DIM):
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def lookup_of(keys, rows):
    def lookup(requested):
        there = np.isin(keys, requested)
        return keys[there], rows[there]

    return lookup


def test_size_decides_the_kind_with_hysteresis():
    rules = IndexPolicy(flat_max=100, half_max=1000)
    assert [rules.kind_for(count) for count in (0, 100, 101, 1000, 1001)] == [
        "flat", "flat", "flat-fp16", "flat-fp16", "hnsw"
    ]  # fmt: skip
    assert rules.kind_for(60, current="flat-fp16") == "flat-fp16" and rules.kind_for(50, current="flat-fp16") == "flat"
    assert rules.kind_for(501, current="hnsw") == "hnsw" and rules.kind_for(500, current="hnsw") == "flat-fp16"
    assert rules.kind_for(5, requested="hnsw") == "hnsw" and rules.kind_for(5, requested="auto") == "flat"
    assert IndexPolicy(kind="hnsw").kind_for(5) == "hnsw"
    assert rules.exact_limit(100) == 40_000 and rules.exact_limit(10**6) == 150_000


def test_the_float16_error_is_within_its_bound():
    """The bound is what makes a float16 scan exact: also for one-hot rows, tiny numbers and many dimensions."""
    for dim in (8, 512, 2048):
        rows = np.concatenate([unit(200, dim=dim), np.eye(dim, dtype=np.float32)[:50]])
        rows[:50] **= 5
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        keys = np.arange(len(rows))
        half = HalfIndex(dim, lookup_of(keys, rows))
        half.add(keys, rows)
        rounded, found = half.codes.search(rows, len(rows))
        assert np.abs(rounded - np.take_along_axis(rows @ rows.T, found, axis=1)).max() < ROUNDING


def test_a_float16_index_resolves_ties_caused_by_rounding():
    """Hundreds of rows nearer to one another than float16 resolves: the order is still that of float32."""
    base = unit(1)[0]
    rows = base + 3e-5 * np.random.default_rng(2).normal(size=(600, DIM)).astype(np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    keys = np.arange(600) * 2
    half = HalfIndex(DIM, lookup_of(keys, rows))
    half.add(keys, rows)
    expected = best_candidates(rows[9], keys, rows, 10)
    (found,) = half.search(rows[9:10], 10)
    assert found[0].tolist() == expected[0].tolist() and np.array_equal(found[1], expected[1])
    half.remove(expected[0][:4])
    (after,) = half.search(rows[9:10], 6)
    assert after[0].tolist() == expected[0][4:].tolist() and half.tombstones == 4


@pytest.mark.parametrize("count", [40, 2048, 5000])
@pytest.mark.parametrize("step", [None, 1, 7])
def test_scanning_blocks_equals_scanning_rows(count, step):
    rows, keys = unit(count), np.arange(count)
    half = HalfIndex(DIM, lookup_of(keys, rows))
    half.add(keys, rows)
    half.remove(keys[: count // 3])
    among = None if step is None else keys[::step]
    queries = unit(MIN_BLOCK_QUERIES, seed=1)
    together = half.search(queries, 9, among=among)
    for query, (found, similarities) in zip(queries, together, strict=True):
        ((alone, same),) = half.search(query[None], 9, among=among)
        assert found.tolist() == alone.tolist() and np.array_equal(similarities, same)
        left = keys[count // 3 :] if step is None else np.intersect1d(keys[::step], keys[count // 3 :])
        assert alone.tolist() == best_candidates(query, left, rows[left], 9)[0].tolist()


def test_every_kind_applies_filters_and_one_that_does_not_is_detected():
    check_index_filters(8)
    unbounded = partial(faiss.SearchParametersHNSW, bounded_queue=False)
    assert applies_filter(empty_graph(8)) and not applies_filter(empty_graph(8), unbounded)
    with pytest.raises(StartupError, match="hnsw"):
        check_filters({"flat": (faiss.IndexFlatIP(8), faiss.SearchParameters), "hnsw": (empty_graph(8), unbounded)})
    assert not applies_filter(faiss.IndexLSH(8, 8))  # it raises: selectors are not supported


def test_the_gpu_copy_is_kept_up_to_date_and_not_used_for_filters_it_ignores():
    """On a CPU index that records the calls, as there may be no GPU."""
    calls = []

    class Counted(faiss.IndexFlatIP):
        def search(self, queries, k, *, params):
            calls.append(params.sel is not None)
            return super().search(queries, k, params=params)

    rows, keys = unit(300), np.arange(300)
    plain, half = HalfIndex(DIM, lookup_of(keys, rows)), HalfIndex(DIM, lookup_of(keys, rows))
    half.gpu = GpuScan(half.codes, Counted, filters=False)
    for part in (slice(0, 200), slice(200, 300)):
        plain.add(keys[part], rows[part])
        half.add(keys[part], rows[part])
        for one, two in zip(plain.search(rows[:9], 5), half.search(rows[:9], 5), strict=True):
            assert one[0].tolist() == two[0].tolist() and np.array_equal(one[1], two[1])
    assert calls == [False, False]
    assert half.search(rows[:1], 5, among=keys[::2])[0][0].tolist() == plain.search(rows[:1], 5, among=keys[::2])[0][
        0
    ].tolist() and len(calls) == 2  # fmt: skip
    half.gpu.filters = True
    half.search(rows[:1], 5, among=keys[::2])
    assert calls == [False, False, True]


def test_a_missing_gpu_is_reported():
    if faiss.get_num_gpus():
        pytest.skip("there is a GPU")
    assert open_gpu("auto") is None and open_gpu("cpu") is None
    with pytest.raises(StartupError, match="index_device cuda"):
        open_gpu("cuda")


def test_tuning_is_measured_and_applied():
    found = tune_faiss(DIM, budget_s=0.02)
    assert found.threads >= 1 and 2 <= found.blas_queries <= 32 and tune_faiss(DIM, budget_s=0.02) is found
    found.apply(DIM)
    assert faiss.cvar.distance_compute_blas_threshold == found.blas_queries * DIM


@pytest.fixture
def kept(tmp_path):
    """A graph in a file; its folder's files, keys and rows."""
    rows, keys = unit(400), np.arange(400) * 3
    graph = empty_graph(DIM)
    graph.add(rows)
    files = GraphFiles(tmp_path)
    files.save(LOBBY, SPACE, GraphSegment(keys, graph, 77))
    return files, next((tmp_path / GRAPH_FOLDER).iterdir()), keys, rows


def test_a_saved_graph_is_loaded_and_contains_no_features(kept):
    files, path, keys, rows = kept
    found = files.load(LOBBY, SPACE)
    assert found.keys.tolist() == keys.tolist() and found.revision == 77 and found.graph.ntotal == 400
    data = path.read_bytes()
    assert not [row for row in rows if row[:4].tobytes() in data or row[:6].astype(np.float16).tobytes() in data]
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    codes = HalfIndex(DIM, lookup_of(keys, rows)).codes
    codes.add(rows)
    found.graph.storage, found.graph.own_fields = codes, False
    index = GraphIndex(found.graph, found.keys, keys[:2], lookup_of(keys, rows))
    assert index.search(rows[5:6], 1)[0][0].tolist() == [15] and len(index) == 398


@pytest.mark.parametrize("where", [0, 9, 60, 500, 5000, -1])
def test_a_graph_file_with_a_changed_byte_is_deleted(kept, where, caplog):
    files, path, _, _ = kept
    data = bytearray(path.read_bytes())
    data[where] ^= 0x5A
    path.write_bytes(data)
    assert files.load(LOBBY, SPACE) is None and not path.exists() and "built again" in caplog.text


@pytest.mark.parametrize("keep", [0, 5, 11, 40, 3000])
def test_a_truncated_graph_file_is_deleted(kept, keep):
    files, path, _, _ = kept
    path.write_bytes(path.read_bytes()[:keep])
    assert files.load(LOBBY, SPACE) is None and not path.exists()


def test_a_graph_file_of_another_collection_or_space_is_not_used(kept):
    files, path, _, _ = kept
    other = Space("cd" * 16, "next", DIM)
    assert files.load(LOBBY, other) is None
    path.rename(path.with_name(path.name.replace("3-", "4-")))
    assert files.load(Collection("hall", SPACE, key=4), SPACE) is None and not list(path.parent.iterdir())


def test_symlinks_are_not_followed_and_an_unwritable_folder_is_no_error(kept, tmp_path, caplog):
    files, path, keys, rows = kept
    aside = path.rename(tmp_path / "aside")
    path.symlink_to(aside)
    assert files.load(LOBBY, SPACE) is None and aside.exists()
    graph = empty_graph(DIM)
    graph.add(rows)
    (tmp_path / "file").write_text("")
    GraphFiles(tmp_path / "file").save(LOBBY, SPACE, GraphSegment(keys, graph, 1))
    assert "is not saved" in caplog.text
