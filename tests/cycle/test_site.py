"""site.toml: keys, errors, and their documentation."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tiny import resight_here, the_error

from resight.cycle.site import SiteFile, load_site, section_of
from resight.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
LEAST = 'name = "lobby"\n[service]\nmodel_root = "models"\nbundle = "models/first"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text)
    return path


def keys(kind: type[BaseModel] = SiteFile, prefix: str = "") -> Iterator[str]:
    """Every key as a dotted name, without the sections themselves."""
    for name in kind.model_fields:
        try:
            inner = section_of(kind, name)
        except AssertionError:
            yield prefix + name
            continue
        yield from keys(inner, f"{prefix}{name}.")


def test_a_minimal_file_is_valid_and_paths_are_relative_to_it(tmp_path: Path) -> None:
    site = load_site(written(tmp_path, LEAST))
    assert (site.state, site.service.model_root) == (tmp_path / "state", tmp_path / "models")
    assert site.model_id(42) == "lobby-000042" and site.camera == () and site.adapt.base == "builtin"
    assert load_site(tmp_path) == site  # a folder is accepted for its file


def test_the_file_that_init_writes_has_every_key_with_its_default(tmp_path: Path) -> None:
    assert resight_here("cycle", "init", tmp_path / "lobby").returncode == 0
    path = tmp_path / "lobby" / "site.toml"
    site, text = load_site(path), path.read_text()
    assert site.camera[0].source == str(tmp_path / "lobby" / "footage/door/*.mp4")
    enabled = tomllib.loads(re.sub(r"^# (?=\w+ = |\[\[)", "", text, flags=re.MULTILINE))  # commented-out lines enabled
    assert {name for name in keys() if name not in flat(enabled)} == set()
    assert set(flat(enabled)) == set(keys())
    least = load_site(written(tmp_path, LEAST))
    for section in ("collect", "adapt", "gate", "export", "migrate", "shadow", "watch", "schedule"):
        assert getattr(site, section) == getattr(least, section), section
    assert "exists" in the_error(resight_here("cycle", "init", tmp_path / "lobby"))


def flat(table: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in table.items():
        value = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        found += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found


def test_the_guide_lists_exactly_the_keys() -> None:
    guide = (ROOT / "docs" / "cycle.md").read_text().split("## site.toml")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", guide, re.MULTILINE)) == set(keys())


def test_every_key_has_a_description_in_its_class() -> None:
    def sections(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield kind
        for name in kind.model_fields:
            try:
                yield from sections(section_of(kind, name))
            except AssertionError:
                continue

    for kind in sections(SiteFile):
        documented = re.findall(r"^ {4,8}(\w+): ", (kind.__doc__ or "").partition("Attributes:")[2], re.MULTILINE)
        assert documented == list(kind.model_fields), kind.__name__


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LEAST + "modelroot = 1\n", ["service.modelroot", "did you mean 'model_root'?"]),
        (LEAST + "[watch]\nminuets = 5\n", ["watch.minuets", "did you mean 'minutes'?"]),
        (LEAST + "[[camera]]\nname = 'door'\nsource = 'a.mp4'\ndetections_file = 'b'\n", ["camera[0].detections_file"]),
        ("names = 'x'\n" + LEAST, ["no key names", "did you mean 'name'?"]),
        (LEAST.replace('name = "lobby"\n', ""), ["name is missing"]),
        ('name = "lobby"\n', ["service is missing"]),
        (LEAST.replace("lobby", "Lobby 2"), ["name", "found 'Lobby 2'"]),
        (LEAST + "[collect]\nmin_crops = 0\n", ["collect.min_crops", "greater than or equal to 1", "found 0"]),
        (LEAST + "[schedule]\nwindow = '2-5'\n", ["schedule.window", "found '2-5'"]),
        (LEAST + "[schedule]\nwindow = '02:00-02:00'\n", ["a window longer than zero"]),
        (LEAST + "[schedule]\ncron = 'at night'\n", ["schedule.cron", "Wrong number of fields"]),
        (LEAST + "[schedule]\ntimezone = 'Europe/Nowhere'\n", ["IANA", "Europe/Nowhere"]),
        (LEAST + "[[camera]]\nname = 'a'\nsource = 'x'\nstart = 2026-11-21T02:00:00\n", ["with its offset"]),
        (LEAST + "[[camera]]\nname = 'a'\nsource = 'x'\ntracks = 'mine'\n", ["camera[0].tracks", "'own' or 'given'"]),
        (LEAST + 2 * "[[camera]]\nname = 'a'\nsource = 'x'\n", ["two of [[camera]]", "'a'"]),
        (LEAST + 2 * "[[gallery]]\ncollection = 'a'\n", ["two of [[gallery]]"]),
        (LEAST + "[watch]\naction = 'pray'\n", ["watch.action", "'alert' or 'rollback'", "found 'pray'"]),
        ("name = \n", ["cannot be read as TOML"]),
    ],
)
def test_an_error_names_the_key_and_the_expected_value(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_site(written(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    message = the_error(resight_here("cycle", "once", tmp_path / "site.toml"))
    assert "resight cycle init" in message
