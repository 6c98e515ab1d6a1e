import asyncio
import io
import threading
import time

import numpy as np
from PIL import Image
from serving import jpeg

from resight.errors import ImageTooLargeError, ImageUndecodableError, ModelError, UnavailableError
from resight.image import ImageSpec, decode, fit
from resight.runtime.base import DummyRuntime
from resight.service.inference import embedder as module
from resight.service.inference.embedder import STOP_S, Decoders, PixelBudget
from resight.service.inference.priority_queue import CropJob, Priority
from resight.service.settings import Settings

SPEC = ImageSpec(height=64, width=32)


def decode_all(tmp_path, crops, *, check=lambda crop: None, start=True, **settings):
    """The jobs of some crops, decoded or failed, in order of completion."""
    out: list[CropJob] = []
    done = threading.Event()

    def record(job: CropJob) -> None:
        out.append(job)
        if len(out) == len(crops):
            done.set()

    async def body():
        decoders = Decoders(record, record, check, Settings(bundle=tmp_path, data=tmp_path, **settings))
        answer = asyncio.get_running_loop().create_future()
        for priority, crop in crops:
            decoders.put(CropJob(crop, DummyRuntime(SPEC), priority, time.monotonic() + 60, answer))
        if start:
            decoders.start()
            assert await asyncio.to_thread(done.wait, 30)
        await asyncio.to_thread(decoders.stop)

    asyncio.run(body())
    return out


def test_decoded_jobs_have_the_fitted_pixels_and_come_in_order_of_priority(tmp_path):
    crops = [(priority, jpeg(n, size=(50, 90))) for priority in reversed(Priority) for n in range(4)]
    out = decode_all(tmp_path, crops, decode_threads=1)
    assert [job.priority for job in out] == sorted(priority for priority, _ in crops)
    for job in out:
        assert job.outcome is None and np.array_equal(job.pixels, fit(decode(job.crop), SPEC))
        assert 0 < job.quality < 1 and job.decode_ns > 0


def test_each_crop_fails_alone(tmp_path):
    def check(crop):
        if crop == b"poison":
            raise ModelError("before")

    large = io.BytesIO()
    Image.new("RGB", (300, 300)).save(large, "PNG")
    caller = Priority.INTERACTIVE
    crops = [(caller, b"poison"), (caller, b"none"), (caller, large.getvalue()), (caller, jpeg(1, size=(40, 60)))]
    out = {job.crop: job.outcome for job in decode_all(tmp_path, crops, check=check, max_image_pixels=80_000)}
    kinds = [type(out[crop]) for _, crop in crops]
    assert kinds == [ModelError, ImageUndecodableError, ImageTooLargeError, type(None)]


def test_waiting_crops_fail_at_shutdown(tmp_path):
    (job,) = decode_all(tmp_path, [(Priority.ENROL, jpeg(1))], start=False)
    assert isinstance(job.outcome, UnavailableError)


def test_no_more_pixels_than_the_budget_are_decoded_at_once(tmp_path, monkeypatch):
    used, peak, lock = 0, 0, threading.Lock()

    class RecordingBudget(PixelBudget):
        def acquire(self, pixels):
            nonlocal used, peak
            super().acquire(pixels)
            with lock:
                used += pixels
                peak = max(peak, used)

        def release(self, pixels):
            nonlocal used
            with lock:
                used -= pixels
            super().release(pixels)

    monkeypatch.setattr(module, "PixelBudget", RecordingBudget)
    buffer = io.BytesIO()
    Image.effect_noise((500, 500), 50).convert("RGB").save(buffer, "JPEG")
    crops = [(Priority.INTERACTIVE, buffer.getvalue())] * 16 + [(Priority.INTERACTIVE, b"broken")] * 4
    out = decode_all(tmp_path, crops, decode_threads=8, decode_pixels=600_000)
    assert sum(job.outcome is None for job in out) == 16
    assert used == 0 and peak == 500_000


def test_an_image_larger_than_the_budget_is_decoded_alone(tmp_path):
    crops = [(Priority.INTERACTIVE, jpeg(n, size=(200, 200))) for n in range(4)]
    out = decode_all(tmp_path, crops, decode_threads=4, decode_pixels=256)
    assert all(job.outcome is None for job in out)


def test_stopping_does_not_wait_for_a_decoder_that_hangs(tmp_path, caplog):
    entered, release = threading.Event(), threading.Event()

    def check(crop: bytes) -> None:
        entered.set()
        release.wait(60)

    async def body():
        settings = Settings(bundle=tmp_path, data=tmp_path, decode_threads=1)
        decoders = Decoders(lambda job: None, lambda job: None, check, settings)
        decoders.start()
        answer = asyncio.get_running_loop().create_future()
        decoders.put(CropJob(b"x", DummyRuntime(SPEC), Priority.INTERACTIVE, time.monotonic() + 60, answer))
        assert await asyncio.to_thread(entered.wait, 30)
        await asyncio.wait_for(asyncio.to_thread(decoders.stop), 4 * STOP_S)

    try:
        asyncio.run(body())
    finally:
        release.set()
    assert "1 decoder threads are still busy" in caplog.text
