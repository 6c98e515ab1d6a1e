"""Evaluation of a bundle through a running service: a server process, enrolment and searches over gRPC.

The scores are computed from the service's search results, not from features computed locally. `LiveSearches` searches
continuously, like a video analytics program; the shadow and watch stages of the cycle need such searches.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self

from resight.client import Client, NewEntry
from resight.errors import ImageError, ReIDError, SiteError, UnavailableError
from resight.metrics.ranking import RankingScore, score_rankings

if TYPE_CHECKING:
    from resight.training.store.crops import CropStore


COLLECTION = "demo"
MAX_IN_FLIGHT = 8  # enough for batches on the server, too few to be rejected
MAX_TOP_K = 10_000  # the server's limit; longer galleries are scored on their first 10,000 hits
START_S, STOP_S = 120.0, 30.0
ENROL_BATCH = 64  # crops per call; the server's default limit

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ServedResult:
    """Search results of a service for every query.

    Attributes:
        score: figures computed from the results.
        rankings: gallery rows per query, best first.
        similarities: cosines of those rows, in [-1, 1].
    """

    score: RankingScore
    rankings: list[list[int]]
    similarities: list[list[float]]


@contextmanager
def running_server(bundle: Path, data: Path, *, max_top_k: int, models: Path | None = None) -> Iterator[str]:
    """Run `resight serve` as a subprocess on a free loopback port; yields its address.

    Args:
        bundle: model to serve.
        data: folder of the gallery and the log.
        max_top_k: maximum number of hits of a search.
        models: folder of more bundles, which can be loaded by name.

    Raises:
        UnavailableError: it exited, was not ready in time, or did not stop cleanly; with the end of its log.
    """
    data.mkdir(parents=True, exist_ok=True)
    log_file = data / "server.log"
    command = [
        sys.executable,
        "-m",
        "resight",
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
        raise UnavailableError(f"the server exited with status {status} instead of 0:\n{_tail(log_file)}")


def _wait_for_address(process: subprocess.Popen[bytes], announced: Path, log_file: Path) -> str:
    """The address in server.json, which the server writes when it is ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UnavailableError(f"the server exited with status {process.returncode}:\n{_tail(log_file)}")
        with suppress(FileNotFoundError):
            announcement = json.loads(announced.read_text())  # written atomically
            if announcement["pid"] == process.pid:  # else left by a killed server
                return str(announcement["address"])
        time.sleep(0.05)
    raise UnavailableError(f"the server was not ready within {START_S:.0f} s:\n{_tail(log_file)}")


def _tail(log_file: Path, lines: int = 15) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-lines:])


def enrol_gallery(
    address: str, gallery: CropStore, advance: Progress, *, collection: str = COLLECTION, keep_crops: bool = False
) -> None:
    """Enrol every crop of a gallery under its row number.

    Args:
        address: of the server.
        gallery: crops to enrol.
        advance: called with the number of crops enrolled.
        collection: to create and enrol into.
        keep_crops: store the crops for a later model, and the persons as subjects, like an operator who enrols people;
            otherwise entries have no subject.

    Raises:
        SiteError: names the first crop that was refused.
        ReIDError: the server could not enrol at all.
    """
    with Client(address, timeout_s=60) as client:
        client.create_collection(collection, unlimited_retention=True, keep_crops=keep_crops)
        for start in range(0, len(gallery), ENROL_BATCH):
            part = [
                _entry(gallery, row, named=keep_crops) for row in range(start, min(start + ENROL_BATCH, len(gallery)))
            ]
            for row, outcome in enumerate(client.enrol_batch(collection, part), start):
                if isinstance(outcome, ReIDError):
                    raise SiteError(f"{gallery.root / gallery.paths[row]} cannot be enrolled: {outcome}") from outcome
            advance(len(part))


def _entry(gallery: CropStore, row: int, *, named: bool) -> NewEntry:
    """The entry of a crop."""
    camera = gallery.camera_names[gallery.cameras[row]]
    subject = f"person-{gallery.persons[row]}" if named else ""
    return NewEntry(gallery.read(row), entry_id=str(row), camera_id=camera, subject_id=subject)


def search_gallery(
    address: str, query: CropStore, gallery: CropStore, advance: Progress, *, collection: str = COLLECTION
) -> ServedResult:
    """Search with every query crop, several in flight, and score the answers.

    Raises:
        SiteError: names a query that is not a usable crop.
        ReIDError: a search failed, or no query has a match in another camera.
    """
    top_k = min(len(gallery), MAX_TOP_K)
    with Client(address, timeout_s=60) as client, ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:

        def search(row: int) -> tuple[list[int], list[float]]:
            try:
                hits = client.search(collection, query.read(row), top_k=top_k).hits
            except ImageError as error:
                raise SiteError(f"{query.root / query.paths[row]} cannot be searched for: {error}") from error
            advance(1)
            return [int(hit.entry.entry_id) for hit in hits], [hit.similarity for hit in hits]

        results = list(pool.map(search, range(len(query))))
    rankings = [rows for rows, _ in results]
    score = score_rankings(rankings, query.persons, gallery.persons, query.cameras, gallery.cameras)
    return ServedResult(score, rankings, [similarities for _, similarities in results])


class LiveSearches:
    """A thread that searches a collection with the given crops in turn, within a ``with`` block.

    Args:
        address: of the server.
        collection: to search.
        crops: JPEG files, one per search.
        per_s: maximum rate, searches per second.

    Attributes:
        answered: number of successful searches.
        errors: messages of the failed ones.
    """

    def __init__(self, address: str, collection: str, crops: Sequence[bytes], *, per_s: float) -> None:
        self.answered = 0
        self.errors: list[str] = []
        self._address, self._collection, self._crops, self._pause_s = address, collection, crops, 1 / per_s
        self._stop = Event()
        self._thread = Thread(target=self._search, name="live-searches")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _search(self) -> None:
        with Client(self._address) as client:
            for crop in itertools.cycle(self._crops):
                if self._stop.wait(self._pause_s):
                    return
                try:
                    client.search(self._collection, crop)
                    self.answered += 1
                except ReIDError as error:
                    self.errors.append(str(error))


MARKER_FILE = ".resight-demo"  # a later demo may delete a folder that contains this file


def prepare_folder(out: Path) -> None:
    """Create an empty folder for a demo; the output of an earlier demo is deleted.

    Raises:
        SiteError: the folder exists and was not created by a demo.
    """
    if out.exists() and not (out / MARKER_FILE).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise SiteError(f"{out} exists and was not created by a demo: choose another --out, or remove it")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER_FILE).write_text("made by `resight demo`; the next one removes it\n")
