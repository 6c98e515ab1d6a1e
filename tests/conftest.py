"""Fixtures for several folders of tests: a synthetic site, a random checkpoint and a bundle, each made once."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hardware import no_gpu
from serving import make_bundle
from tiny import draw_site, write_random_checkpoint

from resight.bundle.bundle import Bundle, open_bundle
from resight.training.store.datasets import Site


@pytest.fixture(scope="session")
def tiny_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Read only: tests that alter a site copy it."""
    return draw_site(tmp_path_factory.mktemp("tiny") / "site")


@pytest.fixture(scope="session")
def tiny_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random encoder. Read only."""
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny") / "init")


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny").path


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return open_bundle(bundle_path)


@pytest.fixture(scope="module", autouse=True)
def _memory_returned() -> Iterator[None]:
    """Return freed memory to the system after each test file; glibc would keep the pages until the worker ends."""
    yield
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` if there is none, with the reason."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: real crops and weights are not ours to ship; see CONTRIBUTING.md")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real crops, if they are beside the checkout; else the test is skipped."""
    return _shared("data/market-subset")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Real initial weights, likewise."""
    return _shared("weights")
