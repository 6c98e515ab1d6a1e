"""`resight doctor` on intact and damaged data folders and a running server, through the command line."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from serving import ServerProcess, jpeg, make_bundle

from resight.client import Client, NewEntry
from resight.service.access.auth import Role, TokenFile
from resight.service.storage import snapshots
from resight.service.storage.data_folder import DATABASE_FILE

pytestmark = pytest.mark.long

CODE = "from resight.cli.main import main; main()"


def doctor(out, *flags: str) -> tuple[int, dict[tuple[str, str], dict[str, str]], str]:
    """Exit status, checks by area and name, and the table."""
    command = [sys.executable, "-c", CODE, "doctor", "--json", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert "Traceback" not in done.stderr, done.stderr
    checks = json.loads(out.read_text())
    for check in checks:
        assert check["verdict"] in ("ok", "warn", "fail") and check["found"]
        assert bool(check["next_step"]) == (check["verdict"] != "ok"), check
    return done.returncode, {(check["area"], check["name"]): check for check in checks}, done.stdout


@pytest.fixture
def gallery(bundle_path, tmp_path):
    """A data folder that a server has used, with a snapshot and a tenant of another name."""
    data = tmp_path / "data"
    server = ServerProcess(bundle_path, data)
    with Client(server.wait_ready()) as client:
        client.create_collection("held", unlimited_retention=True)
        client.enrol_batch("held", [NewEntry(jpeg(n), f"e{n}") for n in range(10)])
    assert server.end() == 0
    snapshots.create(data / DATABASE_FILE, "monday")
    return data


def test_all_checks_pass(bundle_path, gallery, tmp_path):
    status, checks, table = doctor(tmp_path / "out.json", "--data", str(gallery), "--bundle", str(bundle_path))
    assert status == 0, checks
    assert checks["data", "integrity"]["found"] == "ok"
    assert checks["data", "features"]["found"] == "10 checksums are correct"
    assert checks["data", "lock"]["found"] == "free" and checks["data", "permissions"]["verdict"] == "ok"
    assert checks["data", "snapshot monday"]["verdict"] == "ok" and checks["bundle", "probes"]["verdict"] == "ok"
    assert {name for area, name in checks if area == "machine"} >= {"versions", "providers", "cores", "memory", "clock"}
    assert "resight doctor" in table and "snapshot monday" in table


def test_a_running_server_and_its_folder(bundle_path, gallery, tmp_path):
    token, _ = TokenFile(gallery).create("doctor", Role.READER)
    server = ServerProcess(bundle_path, gallery)
    try:
        address = server.wait_ready()
        status, checks, _ = doctor(tmp_path / "none.json", "--server", address)
        assert status == 1 and checks["server", "reachable"]["verdict"] == "fail"  # no token
        os.environ["RESIGHT_TOKEN"] = token
        status, checks, table = doctor(tmp_path / "out.json", "--server", address, "--data", str(gallery))
        assert status == 0, checks
        assert checks["data", "lock"]["found"] == f"held by process {server.process.pid}"
        assert checks["server", "health"]["found"] == "SERVING" and "max_top_k" in checks["server", "limits"]["found"]
        assert "ms" in checks["server", "latency"]["found"] and token not in table
    finally:
        os.environ.pop("RESIGHT_TOKEN", None)
        assert server.end() == 0


def test_damaged_parts_are_named(gallery, tmp_path):
    with closing(sqlite3.connect(gallery / DATABASE_FILE)) as database:
        (vector,) = database.execute("SELECT vector FROM feature WHERE entry = 3").fetchone()
        flipped = bytes([vector[0] ^ 1]) + vector[1:]
        database.execute("UPDATE feature SET vector = ? WHERE entry = 3", (flipped,))
        database.commit()
    copy = gallery / "snapshots" / "monday" / DATABASE_FILE
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    (gallery / "index").mkdir(exist_ok=True)
    (gallery / "index" / "1-0000.graph").write_bytes(b"no graph")
    (gallery / DATABASE_FILE).chmod(0o644)
    before = {path: path.read_bytes() for path in gallery.rglob("*") if path.is_file()}
    status, checks, _ = doctor(tmp_path / "out.json", "--data", str(gallery))
    assert status == 1
    assert checks["data", "features"]["verdict"] == "fail" and "[3]" in checks["data", "features"]["found"]
    assert checks["data", "snapshot monday"]["verdict"] == "fail"
    assert checks["data", "graphs"]["verdict"] == "warn" and "1-0000.graph" in checks["data", "graphs"]["found"]
    assert checks["data", "permissions"]["verdict"] == "warn" and "chmod" in checks["data", "permissions"]["next_step"]
    assert before == {path: path.read_bytes() for path in gallery.rglob("*") if path.is_file()}  # it changes nothing


def test_a_damaged_database_and_a_bad_bundle_are_reported_not_raised(gallery, tmp_path):
    database = gallery / DATABASE_FILE
    data = bytearray(database.read_bytes())
    data[4096 * 3 : 4096 * 6] = b"\x55" * (4096 * 3)
    database.write_bytes(data)
    bad = make_bundle(tmp_path / "bad", probes_of=7)
    status, checks, _ = doctor(tmp_path / "out.json", "--data", str(gallery), "--bundle", str(bad.path))
    assert status == 1 and checks["bundle", "probes"]["verdict"] == "fail"
    failed = [name for (area, name), check in checks.items() if area == "data" and check["verdict"] == "fail"]
    assert failed and set(failed) <= {"database", "integrity", "features", "schema"}
    status, checks, _ = doctor(tmp_path / "none.json", "--data", str(tmp_path / "nowhere"), "--server", "127.0.0.1:1")
    assert status == 1 and checks["data", "folder"]["verdict"] == checks["server", "reachable"]["verdict"] == "fail"
