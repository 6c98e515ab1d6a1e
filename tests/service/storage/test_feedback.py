"""Feedback on pairs of entries, over a socket: stored, contradicted, removed, and deleted with their entries."""

import asyncio
import itertools
import json
import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from grpc_status import rpc_status
from serving import ServerProcess, jpeg
from stores import create_collection, enrolment, files_with, open_gallery
from tiny import resight_here, the_error

from resight.client import Client, NewEntry
from resight.errors import (
    CollectionNotFoundError,
    EntryNotFoundError,
    FeedbackConflictError,
    FeedbackNotFoundError,
    InputError,
    PermissionDeniedError,
    ReIDError,
)
from resight.service.access.auth import Role
from resight.service.storage import feedback, reads, writes
from resight.service.storage.audit import AuditEvent
from resight.status import from_status
from resight.v1 import gallery_pb2, gallery_pb2_grpc

SAME, DIFFERENT = gallery_pb2.FEEDBACK_VERDICT_SAME_PERSON, gallery_pb2.FEEDBACK_VERDICT_DIFFERENT_PERSON


@pytest.fixture
def people(client, collection):
    """Entries a..f."""
    client.enrol_batch(collection, [NewEntry(jpeg(number), name) for number, name in enumerate("abcdef")])
    return collection


def list_verdicts(client, collection) -> list[tuple[str, str, bool]]:
    return [(one.entry_id, one.other_entry_id, one.same) for one in client.list_feedback(collection)]


def test_a_verdict_is_stored_listed_changed_and_removed(client, people):
    begun = datetime.now(UTC)
    first = client.confirm(people, "b", "a")
    assert (first.entry_id, first.other_entry_id, first.same, first.principal) == ("a", "b", True, "anonymous")
    assert begun <= first.time <= datetime.now(UTC)
    client.reject(people, "c", "d")
    assert list_verdicts(client, people) == [("a", "b", True), ("c", "d", False)]
    assert client.reject(people, "a", "b").time > first.time  # a pair has no order, the last verdict counts
    assert list_verdicts(client, people) == [("a", "b", False), ("c", "d", False)]
    client.remove_feedback(people, "d", "c")
    assert list_verdicts(client, people) == [("a", "b", False)]
    with pytest.raises(FeedbackNotFoundError, match="there is no feedback"):
        client.remove_feedback(people, "c", "d")
    client.remove_feedback(people, "c", "d", allow_missing=True)
    client.remove_feedback(people, "c", "nobody", allow_missing=True)
    rows = [row for row in client.audit_events(start=begun) if row.collection == people]
    assert [(row.method.partition(".")[2], row.affected) for row in reversed(rows)] == [
        *[("AddFeedback", 2)] * 3,
        *[("RemoveFeedback", affected) for affected in (2, 0, 0)],
    ]


def test_a_contradicting_verdict_is_refused_and_the_pairs_are_named(client, people):
    client.confirm(people, "a", "b")
    client.confirm(people, "b", "c")
    with pytest.raises(FeedbackConflictError, match="'c', 'b', 'a' are recorded as the same person") as refused:
        client.reject(people, "c", "a")
    assert refused.value.field == "verdict"
    client.reject(people, "c", "d")
    with pytest.raises(FeedbackConflictError, match="'c', 'd' are recorded as different people"):
        client.confirm(people, "d", "a")
    assert list_verdicts(client, people) == [("a", "b", True), ("b", "c", True), ("c", "d", False)]
    client.reject(people, "b", "c")  # the pair's own verdict is no contradiction
    client.reject(people, "c", "a")
    client.confirm(people, "d", "a")
    client.delete_entry(people, "d")


def test_pages_are_consecutive(client, collection, channel):
    client.enrol_batch(collection, [NewEntry(jpeg(number), f"e{number}") for number in range(12)])
    pairs = [(f"e{number}", f"e{number + 1}", number % 2 == 0) for number in range(11)]
    for one, other, same in pairs:
        (client.confirm if same else client.reject)(collection, one, other)
    stub, found = gallery_pb2_grpc.GalleryServiceStub(channel), []
    request = gallery_pb2.ListFeedbackRequest(collection_id=collection, page_size=4)
    while True:
        page = stub.ListFeedback(request)
        assert len(page.feedback) <= 4
        found += [(one.entry_id, one.other_entry_id, one.verdict == SAME) for one in page.feedback]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert found == pairs


def add(channel, collection, one="a", other="b", verdict=SAME, **more):
    request = gallery_pb2.AddFeedbackRequest(
        collection_id=collection, entry_id=one, other_entry_id=other, verdict=verdict, **more
    )
    try:
        return gallery_pb2_grpc.GalleryServiceStub(channel).AddFeedback(request)
    except grpc.RpcError as failure:
        raise from_status(rpc_status.from_call(failure)) from None


def test_a_replay_changes_nothing(client, people, channel):
    assert not add(channel, people, request_id="r1").replayed
    client.reject(people, "a", "b")
    again = add(channel, people, request_id="r1")
    assert again.replayed and again.feedback.verdict == DIFFERENT
    for changed in ({"verdict": DIFFERENT}, {"other": "c"}):
        with pytest.raises(InputError, match="another request"):
            add(channel, people, request_id="r1", **changed)
    client.remove_feedback(people, "a", "b")
    with pytest.raises(FeedbackNotFoundError):
        add(channel, people, request_id="r1")
    assert list_verdicts(client, people) == []


@pytest.mark.parametrize(
    "wrong, error, field",
    [
        ({"verdict": 0}, InputError, "verdict"),
        ({"verdict": 17}, InputError, "verdict"),
        ({"other": "a"}, InputError, "other_entry_id"),
        ({"other": "nobody"}, EntryNotFoundError, "other_entry_id"),
        ({"one": "nobody"}, EntryNotFoundError, "entry_id"),
        ({"one": ""}, EntryNotFoundError, "entry_id"),
        ({"one": "x" * 257}, InputError, "entry_id"),
        ({"other": "\x00"}, InputError, "other_entry_id"),
        ({"request_id": "r" * 129}, InputError, "request_id"),
        ({"one": "a' OR 1=1 --"}, EntryNotFoundError, "entry_id"),
    ],
)
def test_invalid_requests_are_refused_with_the_field(client, people, channel, wrong, error, field):
    with pytest.raises(error) as refused:
        add(channel, people, **wrong)
    assert refused.value.field == field and list_verdicts(client, people) == []
    with pytest.raises(CollectionNotFoundError):
        add(channel, "nowhere")


def test_a_pair_is_deleted_with_either_of_its_entries(client, collection):
    soon = datetime.now(UTC) + timedelta(seconds=1.0)
    client.enrol_batch(collection, [NewEntry(jpeg(n), f"e{n}", f"s{n}") for n in range(8)])
    client.enrol(collection, NewEntry(jpeg(8), "short", expire_time=soon))
    for one, other in (("e0", "e1"), ("e1", "e2"), ("e3", "e4"), ("e5", "e6"), ("e7", "short")):
        client.confirm(collection, one, other)
    client.delete_entry(collection, "e0")
    client.erase_subject("s4", collection=collection)
    client.enrol(collection, NewEntry(jpeg(6), "e6", replace=True))
    while datetime.now(UTC) <= soon:
        time.sleep(0.05)
    assert list_verdicts(client, collection) == [("e1", "e2", True)]
    client.reject(collection, "e3", "e5")
    with pytest.raises(EntryNotFoundError):
        client.reject(collection, "e7", "short")


def test_no_byte_of_an_erased_pair_is_left(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_PURGE_INTERVAL_S="0.2")
    names = ("SECRET-ENTRY-1", "SECRET-ENTRY-2")
    try:
        with Client(server.wait_ready()) as client:
            client.create_collection("lobby", unlimited_retention=True)
            for number, name in enumerate((*names, "stays-1", "stays-2")):
                client.enrol("lobby", NewEntry(jpeg(number), name, "anna" if number < 2 else "b"))
            client.confirm("lobby", *names)
            client.confirm("lobby", "stays-1", "stays-2")
            client.reject("lobby", names[0], "stays-1")
            assert client.wait(client.create_snapshot("before")).state == "succeeded"
            snapshot = tmp_path / "data/snapshots/before/gallery.sqlite3"
            assert pairs(snapshot) == 3 and all(files_with(tmp_path, name.encode()) for name in names)
            assert client.erase_subject("anna").storage_scrubbed
            assert list_verdicts(client, "lobby") == [("stays-1", "stays-2", True)]
            until = time.monotonic() + 20
            while not snapshot.exists() or files_with(snapshot.parent, names[0].encode()):  # the next purge replaces it
                assert time.monotonic() < until
                time.sleep(0.1)
            assert pairs(snapshot) == 1
            assert [files_with(tmp_path, name.encode()) for name in names] == [[], []]
            assert pairs(tmp_path / "data/gallery.sqlite3") == 1
    finally:
        assert server.end() == 0


def pairs(path) -> int:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM feedback").fetchone()[0])


def test_roles_and_tenants(guarded):
    with guarded.client(Role.OPERATOR) as operator, guarded.client(Role.OPERATOR, "north") as north:
        for own in (operator, north):
            own.create_collection("pairs", unlimited_retention=True)
            own.enrol_batch("pairs", [NewEntry(jpeg(number), f"e{number}") for number in range(3)])
        with guarded.client(Role.ENROLLER) as enroller, guarded.client(Role.READER) as reader:
            assert enroller.confirm("pairs", "e0", "e1").principal == "default-enroller"
            for refused in (
                lambda: reader.confirm("pairs", "e0", "e2"),
                lambda: list(reader.list_feedback("pairs")),
                lambda: reader.remove_feedback("pairs", "e0", "e1"),
            ):
                with pytest.raises(PermissionDeniedError, match="enroller"):
                    refused()
        assert list_verdicts(operator, "pairs") == [("e0", "e1", True)] and list_verdicts(north, "pairs") == []
        with pytest.raises(FeedbackNotFoundError):
            north.remove_feedback("pairs", "e0", "e1")
        for own in (operator, north):
            own.delete_collection("pairs", force=True)


def one_group(verdicts: dict[tuple[int, int], bool], count: int) -> bool:
    """Whether people can be assigned to entries so that all verdicts hold; merges groups until nothing changes."""
    person = list(range(count))
    changed = True
    while changed:
        changed = False
        for (one, other), same in verdicts.items():
            if same and person[one] != person[other]:
                person[one] = person[other] = min(person[one], person[other])
                changed = True
    return all(same or person[one] != person[other] for (one, other), same in verdicts.items())


@pytest.mark.parametrize("seed", range(2))
def test_stored_verdicts_are_always_consistent(tmp_path, seed):
    """A verdict is accepted exactly when an assignment of people to entries satisfies it and all earlier ones."""
    chance, count, verdicts = random.Random(seed), 9, {}

    async def body():
        lobby = await create_collection(store)
        for number in range(count):
            await store.write(writes.enrol, lobby, enrolment(number))
        lobby = await store.read(reads.collection, "lobby")
        taken = refused = 0
        for _ in range(150):
            one, other = sorted(chance.sample(range(count), 2))
            same, pair = chance.random() < 0.4, (f"e{other}", f"e{one}")
            if chance.random() < 0.1 and (one, other) in verdicts:
                await store.erase(feedback.remove, lobby, pair, AuditEvent("x", "y"), allow_missing=False)
                del verdicts[one, other]
                continue
            possible = one_group(verdicts | {(one, other): same}, count)
            try:
                await store.write(feedback.add, lobby, pair, AuditEvent("x", "y"), same=same)
            except FeedbackConflictError:
                assert not possible
                refused += 1
                continue
            assert possible
            verdicts[one, other] = same
            taken += 1
        assert taken > 40 and refused > 40
        found = await store.read(feedback.list_records, lobby.key, after=0, limit=1000)
        assert {(int(one.entry_id[1:]), int(one.other_entry_id[1:])): one.same for one in found} == verdicts

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


def test_the_command_line_confirms_rejects_lists_and_removes(client, collection, address, tmp_path, monkeypatch):
    monkeypatch.setenv("RESIGHT_SERVER", address)
    client.enrol_batch(collection, [NewEntry(jpeg(number), f"e{number}", f"s{number}") for number in range(3)])
    crop = tmp_path / "seen.jpg"
    crop.write_bytes(jpeg(1, 5))

    def run(*words: object) -> None:
        done = resight_here("gallery", *words)
        assert done.returncode == 0, done.stderr

    run("confirm", collection, "e0", "e1")
    run("reject", collection, "e0", "e2")
    listed = list_verdicts(client, collection)
    assert listed == [("e0", "e1", True), ("e0", "e2", False)]
    for words, why in (
        (("e0",), "either the id of the other entry, or --image"),
        (("e0", "e1", "--image", crop), "either the id of the other entry, or --image"),
        (("e0", "--image", tmp_path / "none.jpg"), "keeps no crops"),
        (("e0", "--image", crop), "keeps no crops"),
        (("e1", "e2"), None),
        (("e2", "e1"), "'e0'"),
    ):
        done = resight_here("gallery", "reject" if why is None else "confirm", collection, *words)
        assert done.returncode == 0 if why is None else why in the_error(done)
    resight_here("gallery", "update", collection, "--keep-crops")
    run("confirm", collection, "e1", "--image", crop, "--camera", "door")
    entry = client.get_entry(collection, "seen.jpg")
    assert (entry.subject_id, entry.camera_id) == ("s1", "door")
    run("feedback", collection, "--remove", "e0", "e2", "--json", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())
    assert [(row["entry_id"], row["other_entry_id"], row["same"]) for row in rows] == [
        ("e0", "e1", True),
        ("e1", "e2", False),
        ("e1", "seen.jpg", True),
    ]


def test_concurrent_verdicts_are_all_stored(client, collection):
    """Sent from several threads, as an operator's tool might."""
    client.enrol_batch(collection, [NewEntry(jpeg(number), f"e{number}") for number in range(16)])
    all_pairs = list(itertools.combinations(range(16), 2))

    def add_pair(pair: tuple[int, int]) -> bool:
        try:
            (client.confirm if pair[0] % 4 == pair[1] % 4 else client.reject)(collection, *(f"e{n}" for n in pair))
            return True
        except ReIDError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(add_pair, all_pairs))
    assert len(list_verdicts(client, collection)) == len(all_pairs) == 120
