"""What several folders of tests share: one drawn site and one random start, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import draw_site, write_random_checkpoint

from resight.training.datasets import Site


@pytest.fixture(scope="session")
def tiny_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Read only: tests that alter a site copy it."""
    return draw_site(tmp_path_factory.mktemp("tiny") / "site")


@pytest.fixture(scope="session")
def tiny_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random encoder. Read only."""
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny") / "init")
