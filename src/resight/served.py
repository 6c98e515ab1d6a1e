"""A bundle measured as its users meet it: a server process, enrolments and searches over gRPC.

Used by the demos. What is scored are the service's own answers, not features computed beside it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resight.client import Client, NewEntry
from resight.errors import ImageError, ReIDError, SiteError, UnavailableError
from resight.ranking import RankingScore, score_rankings

if TYPE_CHECKING:
    from resight.training.crops import CropStore

COLLECTION = "demo"
IN_FLIGHT = 8  # enough for the server to batch, few enough that none is refused
MAX_TOP_K = 10_000  # the server's own upper bound; longer galleries are scored on their first 10,000 hits
START_S, STOP_S = 120.0, 30.0
CHUNK = 64  # crops of one enrolment call, as the server's default limit

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Served:
    """What a service answered for every query.

    Attributes:
        score: figures computed from the answers.
        rankings: gallery rows per query, best first.
        similarities: cosines of those rows, in [-1, 1].
    """

    score: RankingScore
    rankings: list[list[int]]
    similarities: list[list[float]]


@contextmanager
def server(bundle: Path, data: Path, *, max_top_k: int, models: Path | None = None) -> Iterator[str]:
    """Run `resight serve` as a process of its own on a free loopback port; yields its address.

    Args:
        bundle: it starts with.
        data: folder of its gallery, and of its log.
        max_top_k: hits of one search at most.
        models: folder of more bundles, to be loaded by name.

    Raises:
        UnavailableError: it ended or was not ready in time, or did not stop as it should; with the end of its log.
    """
    data.mkdir(parents=True, exist_ok=True)
    log_file = data / "server.log"
    command = [
        sys.executable,
        "-m",
        "resight.cli",
        "serve",
        "--bundle",
        bundle,
        "--data",
        data,
        "--listen",
        "127.0.0.1:0",
        *([] if models is None else ["--models", models]),
    ]
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=log,
            env=os.environ | {"RESIGHT_MAX_TOP_K": str(max_top_k)},
        )
    try:
        yield _wait_for_address(process, data / "server.json", log_file)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    if status != 0:
        raise UnavailableError(f"the server ended with status {status} instead of 0:\n{_tail(log_file)}")


def _wait_for_address(process: subprocess.Popen[bytes], announced: Path, log_file: Path) -> str:
    """The address in server.json, which the server writes when it is ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UnavailableError(f"the server ended with status {process.returncode}:\n{_tail(log_file)}")
        with suppress(FileNotFoundError):
            told = json.loads(announced.read_text())  # written whole or not at all
            if told["pid"] == process.pid:  # not what a server left that was killed
                return str(told["address"])
        time.sleep(0.05)
    raise UnavailableError(f"the server was not ready within {START_S:.0f} s:\n{_tail(log_file)}")


def _tail(log_file: Path, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-lines:])


def enrol(
    address: str, gallery: CropStore, advance: Advance, *, collection: str = COLLECTION, lasting: bool = False
) -> None:
    """Enrol every crop of a gallery under its row number.

    Args:
        address: of the server.
        gallery: what to enrol.
        advance: is told of progress.
        collection: to make and enrol into.
        lasting: whether crops are kept for another model, and persons named, as an operator enrols people; else who
            is on them stays untold.

    Raises:
        SiteError: names the first crop that was refused.
        ReIDError: the server could not enrol at all.
    """
    with Client(address, timeout_s=60) as client:
        client.create_collection(collection, unlimited_retention=True, keep_crops=lasting)
        for start in range(0, len(gallery), CHUNK):
            part = [_entry(gallery, row, named=lasting) for row in range(start, min(start + CHUNK, len(gallery)))]
            for row, outcome in enumerate(client.enrol_batch(collection, part), start):
                if isinstance(outcome, ReIDError):
                    raise SiteError(f"{gallery.root / gallery.paths[row]} cannot be enrolled: {outcome}") from outcome
            advance(len(part))


def _entry(gallery: CropStore, row: int, *, named: bool) -> NewEntry:
    """A crop as it is enrolled."""
    camera = gallery.camera_names[gallery.cameras[row]]
    subject = f"person-{gallery.persons[row]}" if named else ""
    return NewEntry(gallery.read(row), entry_id=str(row), camera_id=camera, subject_id=subject)


def search(
    address: str, query: CropStore, gallery: CropStore, advance: Advance, *, collection: str = COLLECTION
) -> Served:
    """Search with every query crop, several in flight, and score the answers.

    Raises:
        SiteError: names a query that is no usable crop.
        ReIDError: a search failed, or no query has a match in another camera.
    """
    top_k = min(len(gallery), MAX_TOP_K)
    with Client(address, timeout_s=60) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:

        def ask(row: int) -> tuple[list[int], list[float]]:
            try:
                hits = client.search(collection, query.read(row), top_k=top_k).hits
            except ImageError as error:
                raise SiteError(f"{query.root / query.paths[row]} cannot be searched for: {error}") from error
            advance(1)
            return [int(hit.entry.entry_id) for hit in hits], [hit.similarity for hit in hits]

        answers = list(pool.map(ask, range(len(query))))
    rankings = [rows for rows, _ in answers]
    score = score_rankings(rankings, query.persons, gallery.persons, query.cameras, gallery.cameras)
    return Served(score, rankings, [similarities for _, similarities in answers])
