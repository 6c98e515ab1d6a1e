"""Image bytes to fitted pixels, in threads: what decides how much memory decoding may take.

A thread takes a crop, decodes it, fits it, judges it and hands it on without a way through the event loop. However
many crops come, no more than a budget of pixels is full-size at any time: a crop waits, after its header was read and
before a pixel is decoded, until there is room for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from resight.errors import DrainingError, ImageUndecodableError, ReIDError, UnavailableError
from resight.image import decode, fit
from resight.quality import quality
from resight.service.batcher import expired
from resight.service.lanes import Job, Priority
from resight.service.settings import Settings

GONE = UnavailableError("the caller left")  # nobody reads it
_Entry = tuple[int, int, Job | None]
"""Place in the line, number of arrival, and the job; None = stop. Ordered by the first two, which no two share."""
LATER = {Priority.INTERACTIVE: 0, Priority.ENROL: 16, Priority.REEMBED: 128}
"""So many later callers' crops overtake one, and no more; how many of each are embedded is the lanes' business."""


class PixelBudget:
    """Pixels that may be full-size at once.

    Args:
        most: of all images together; a single image is let in alone however large.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._changed = most, 0, threading.Condition()

    def take(self, pixels: int) -> None:
        """Wait until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self._most)
            self._taken += pixels

    def give(self, pixels: int) -> None:
        """Make room again."""
        with self._changed:
            self._taken -= pixels
            self._changed.notify_all()


class Decoders:
    """Threads that decode, callers' crops before enrolments' before a migration's, none of which is starved.

    Args:
        decoded: is given each job that has pixels.
        failed: is given each job whose ``outcome`` is an error.
        check: raises for a crop that must not be embedded.
        settings: limits, number of threads and budget of pixels.
    """

    def __init__(
        self,
        decoded: Callable[[Job], None],
        failed: Callable[[Job], None],
        check: Callable[[bytes], None],
        settings: Settings,
    ) -> None:
        self._decoded, self._failed, self._check, self._settings = decoded, failed, check, settings
        self._budget = PixelBudget(settings.decode_pixels)
        self._jobs: queue.PriorityQueue[_Entry] = queue.PriorityQueue()
        self._number = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"decode_{number}", daemon=True)
            for number in range(settings.decode_threads)
        ]

    def start(self) -> None:
        """Begin to decode."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the crops that are being decoded; the others are told so."""
        self._closing = True
        for _ in self._threads:
            self._jobs.put((-1, self._next_number(), None))
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()[2]
            if job is not None:
                job.outcome = DrainingError("the server is going down: try again when it is back")
                self._failed(job)

    def put(self, job: Job) -> None:
        """Let a job wait for its decoding. Only the event loop's thread calls it."""
        number = self._next_number()
        self._jobs.put((number + LATER[job.priority], number, job))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _work(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            job.outcome = GONE if job.answer.done() else expired(job.deadline)
            if job.outcome is None:
                self._prepare(job)
            (self._decoded if job.outcome is None else self._failed)(job)

    def _prepare(self, job: Job) -> None:
        started_ns, taken, limits = time.perf_counter_ns(), 0, self._settings

        def room(pixels: int) -> None:
            nonlocal taken
            self._budget.take(pixels)
            taken = pixels

        try:
            self._check(job.crop)
            image = decode(
                job.crop, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels, on_header=room
            )
            job.pixels = fit(image, job.runtime.image)
            job.quality = quality(job.pixels, image.shape[:2])
        except ReIDError as error:
            job.outcome = error
        except Exception as error:  # a decoder's own fault on hostile bytes, or no memory: this crop's alone
            job.outcome = ImageUndecodableError(
                f"the image could not be brought to the encoder's size ({type(error).__name__}): send the file again"
            )
        finally:
            if taken:
                self._budget.give(taken)
        job.decode_ns = time.perf_counter_ns() - started_ns
