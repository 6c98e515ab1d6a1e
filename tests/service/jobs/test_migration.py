"""Migration of a collection to another model's space: searched meanwhile, killed in the middle, switched back."""

import asyncio
import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from serving import ServerProcess, features_by_hand, jpeg, make_bundle
from stores import OTHER, SPACE, create_collection, open_gallery

from resight.client import Client, NewEntry
from resight.errors import (
    ConflictError,
    CropsMissingError,
    InputError,
    ModelInUseError,
    ModelNotFoundError,
    SpaceMismatchError,
)
from resight.service.jobs.migration import _activate_and_finish
from resight.service.storage import reads, spaces
from resight.service.storage.operations import Operations, OperationState

pytestmark = pytest.mark.long

SLOW = {"RESIGHT_MAX_BATCH": "1", "RESIGHT_BATCH_DELAY_S": "0"}


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(("a", "b")):
        make_bundle(tmp_path / "models" / name, seed=seed)
    return tmp_path / "models"


def start(root, tmp_path, **env) -> ServerProcess:
    return ServerProcess(root / "a", tmp_path / "data", RESIGHT_MODELS=str(root), **env)


@pytest.fixture
def serving(root, tmp_path):
    server = start(root, tmp_path)
    with Client(server.wait_ready()) as client:
        client.wait(client.load_model("b"))
        yield client
    assert server.end() == 0, server.log.read_text()


def filled(client: Client, name: str, people: int, *, keep_crops: bool = True) -> None:
    client.create_collection(name, unlimited_retention=True, keep_crops=keep_crops)
    entries = [NewEntry(jpeg(p, s), f"{p}-{s}", track_id=f"t{p}") for p in range(people) for s in range(2)]
    assert not [one for one in client.enrol_batch(name, entries) if isinstance(one, Exception)]


def test_a_collection_is_migrated_while_it_is_searched_and_switched_back(serving):
    filled(serving, "lobby", 40)
    serving.enrol("lobby", NewEntry([jpeg(50, 0), jpeg(50, 1)], "shots"))
    old = serving.collection("lobby").space_id
    begun = serving.migrate("lobby", "b")
    serving.enrol("lobby", NewEntry(jpeg(60), "late"))  # written to both spaces
    assert serving.search("lobby", jpeg(60), top_k=1).hits[0].entry.entry_id == "late"
    done = serving.wait(begun)
    assert done.error is None and done.state == "succeeded", done
    assert (done.kind, done.total, done.succeeded, done.failed, done.skipped) == ("migrate", 82, 82, 0, 0)
    assert done.result["activated"] == "false" and float(done.result["track_retrieval_after"]) > 0.9
    assert serving.collection("lobby").space_id == old
    new = serving.model("b").space_id
    with pytest.raises(ConflictError):
        serving.activate_space("lobby", new, expected=new)
    assert serving.activate_space("lobby", new, expected=old) == (new, old)
    assert serving.collection("lobby").space_id == new
    for entry_id, crops in (("7-1", [jpeg(7, 1)]), ("late", [jpeg(60)])):
        found = serving.get_feature("lobby", entry_id)
        assert found.space_id == new and np.allclose(found.vector, features_by_hand(crops, 1)[0], atol=1e-5)
    answer = serving.search("lobby", jpeg(7, 1), top_k=2)
    assert answer.hits[0].entry.entry_id == "7-1" and answer.hits[0].similarity > 0.9999
    serving.enrol("lobby", NewEntry(jpeg(61), "later"))
    serving.activate_space("lobby", old, expected=new)  # and back, without loss
    assert serving.search("lobby", jpeg(61), top_k=1).hits[0].similarity > 0.9999
    assert np.allclose(serving.get_feature("lobby", "later").vector, features_by_hand([jpeg(61)])[0], atol=1e-5)


def test_of_concurrent_migrations_one_starts_and_the_next_may_when_it_has_ended(root, tmp_path):
    make_bundle(root / "c", seed=2)
    server = start(root, tmp_path, **SLOW)
    with Client(server.wait_ready()) as client:
        for model in ("b", "c"):
            client.wait(client.load_model(model))
        filled(client, "lobby", 60)

        def begin(model: str) -> object:
            try:
                return client.migrate("lobby", model, auto_activate=True).operation_id
            except ConflictError:
                return None

        with ThreadPoolExecutor(6) as pool:
            begun = set(pool.map(begin, ["b", "c"] * 3))
        (operation_id,) = begun - {None}
        client.wait(client.operation(operation_id))
        searched = client.collection("lobby").model
        for model in ("tiny-2", "tiny-1", "tiny-0") * 2:  # each immediately after the previous one
            if model != searched:
                name = {"tiny-0": "a", "tiny-1": "b", "tiny-2": "c"}[model]
                assert client.wait(client.migrate("lobby", name, auto_activate=True)).state == "succeeded"
                searched = model
    assert server.end() == 0


def test_missing_crops_are_refused_or_dropped(serving):
    filled(serving, "bare", 3, keep_crops=False)
    with pytest.raises(CropsMissingError, match="6 entries"):
        serving.migrate("bare", "b")
    assert not list(serving.operations())[1:]  # no operation was started
    done = serving.wait(serving.migrate("bare", "b", auto_activate=True, drop_missing=True))
    assert done.error is None and (done.total, done.succeeded, done.skipped) == (6, 0, 6)
    assert serving.search("bare", jpeg(1)).hits == ()
    serving.enrol("bare", NewEntry(jpeg(9), "new"))
    assert serving.search("bare", jpeg(9)).hits[0].entry.entry_id == "new"


def test_what_makes_no_sense_is_refused(serving):
    filled(serving, "lobby", 1)
    for model, error in (("a", InputError), ("c", ModelNotFoundError)):
        with pytest.raises(error):
            serving.migrate("lobby", model)
    with pytest.raises(ModelNotFoundError, match="load its model"):
        serving.activate_space("lobby", "ff" * 16)
    with pytest.raises(SpaceMismatchError, match="migrate it first"):
        serving.activate_space("lobby", serving.model("b").space_id)


def until(client: Client, operation_id: str, count: int):
    """Wait until ``count`` entries are done or the operation has ended; returns it."""
    for _ in range(2000):
        now = client.operation(operation_id)
        if now.succeeded >= count or now.ended:
            return now
        time.sleep(0.005)
    raise AssertionError(now)


@pytest.mark.slow
def test_a_killed_migration_resumes_by_itself_and_is_complete(root, tmp_path):
    first = start(root, tmp_path)
    with Client(first.wait_ready()) as client:
        client.wait(client.load_model("b"))
        filled(client, "lobby", 300)
        begun = client.migrate("lobby", "b", auto_activate=True)
        client.enrol("lobby", NewEntry(jpeg(1000), "during"))
        seen = until(client, begun.operation_id, 64)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert 0 < seen.succeeded < 600
    with open_gallery(tmp_path / "data") as store:  # as if many other operations had run in the meantime

        async def add_operations() -> None:
            for _ in range(150):
                await work.finish((await work.start("snapshot")).operation_id)

        work = Operations(store)
        asyncio.run(add_operations())
    second = start(root, tmp_path)
    with Client(second.wait_ready()) as client:
        old = client.operation(begun.operation_id)
        assert old.state == "interrupted"
        again = client.migrate("lobby", "b") if "continued_by" not in old.result else None
        continuing = again or client.operation(old.result["continued_by"])
        assert continuing.operation_id != begun.operation_id
        done = client.wait(continuing)
        assert done.error is None and (done.total, done.succeeded) == (601, 601)
        new = client.model("b").space_id
        assert client.collection("lobby").space_id == new
        rng = np.random.default_rng(0)
        for person in rng.choice(300, 20, replace=False).tolist():
            found = client.get_feature("lobby", f"{person}-1")
            assert np.allclose(found.vector, features_by_hand([jpeg(person, 1)], 1)[0], atol=1e-5)
        assert client.get_feature("lobby", "during").space_id == new
    assert second.end() == 0


def test_a_cancelled_migration_drops_its_space_and_pins_the_model_until_then(root, tmp_path):
    server = start(root, tmp_path, **SLOW)
    with Client(server.wait_ready()) as client:
        client.wait(client.load_model("b"))
        filled(client, "lobby", 200)
        done = threading.Event()

        def busy():  # callers keep the migration waiting
            with Client(client.address) as own:
                while not done.is_set():
                    own.embed_batch([jpeg(n) for n in range(16)])

        thread = threading.Thread(target=busy)
        thread.start()
        begun = client.migrate("lobby", "b")
        assert client.migrate("lobby", "b").operation_id == begun.operation_id
        with pytest.raises(ModelInUseError, match="migration"):
            client.unload_model("b")
        client.cancel_operation(begun.operation_id)
        ended = client.wait(begun)
        done.set()
        thread.join()
        assert ended.state == "cancelled" and ended.succeeded < 400
        with pytest.raises(SpaceMismatchError, match="migrate it first"):
            client.activate_space("lobby", client.model("b").space_id, allow_incomplete=True)
        client.unload_model("b")
        client.wait(client.load_model("b"))
        done_again = client.wait(client.migrate("lobby", "b"))
        assert done_again.succeeded == 400
    assert server.end() == 0


def test_activation_and_the_end_of_the_migration_are_one_transaction(tmp_path):
    """A crash in between leaves neither or both, so no completed migration is interrupted."""

    async def body():
        lobby, operations = await create_collection(store), Operations(store)
        await store.write(spaces.begin_space, "lobby", OTHER)
        begun = await operations.start("migrate")
        for expected, state, space in (
            (OTHER, OperationState.RUNNING, SPACE),
            (SPACE, OperationState.SUCCEEDED, OTHER),
        ):
            switch = partial(spaces.activate_space, expected=expected.space_id)
            result = {"activated": "true"}
            with contextlib.suppress(ConflictError):
                await store.write(_activate_and_finish, switch, lobby.name, OTHER.space_id, begun.operation_id, result)
            assert (await operations.get(begun.operation_id)).state is state
            assert (await store.read(reads.collection, "lobby")).space == space

    with open_gallery(tmp_path) as store:
        asyncio.run(body())
