"""A drain that a second signal aborts."""

import signal
import time

from serving import ServerProcess


def test_a_second_signal_aborts_the_drain(bundle_path, tmp_path):
    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_DRAIN_DELAY_S="600", RESIGHT_DRAIN_GRACE_S="600")
    server.wait_ready()
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while "draining" not in server.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.process.poll() is None
    assert server.end(signal.SIGTERM, timeout_s=60) == 0  # a tenth of what the drain would take
    assert "stopped" in server.log.read_text() and not (tmp_path / "data" / "server.json").exists()
