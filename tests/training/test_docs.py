"""The pages on training say what the code does: every name they give exists, and every name it has is given."""

import importlib
import re
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from resight.encoder.backbone import BACKBONES
from resight.encoder.checkpoint import INDEX_FILE, MODEL_FILE, RESUME_FILE, Provenance
from resight.encoder.model import EncoderConfig
from resight.training.adaptation.recipe import SECTIONS, Recipe, load_recipe, recipe_names
from resight.training.clustering.cluster import EPS_GRID
from resight.training.store.crops import COLUMNS, SCHEMA, SPLITS, VERSION_KEY, CropStore, open_store

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("crop-store", "checkpoint", "method", "collecting")}
CITED = re.compile(r"\| `((?:training|src/resight)/[\w/]+\.py)` \| (.+) \|$", re.MULTILINE)
CITATIONS = [
    (file, name)
    for page in ("method", "collecting")
    for file, cell in CITED.findall(PAGES[page])
    for name in re.findall(r"`([\w.]+)`", cell)
]


@pytest.mark.parametrize(("file", "name"), CITATIONS)
def test_every_function_the_method_and_collecting_name_exists(file: str, name: str) -> None:
    module = file.removesuffix(".py").removeprefix("src/resight/").replace("/", ".")
    assert callable(attrgetter(name)(importlib.import_module(f"resight.{module}")))


def test_the_method_names_functions_at_all() -> None:
    assert len(CITATIONS) > 35


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_described(name: str) -> None:
    assert f"| `{name}` |" in PAGES["method"]


def test_every_setting_of_a_recipe_is_described_and_no_other() -> None:
    settings = {entry.name for entry in fields(Recipe)} - {"name", *SECTIONS}
    settings |= {f"{section}.{entry.name}" for section, kind in SECTIONS.items() for entry in fields(kind)}
    table = PAGES["method"].split("| setting |")[1]
    assert set(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)) == settings


def test_the_grid_of_eps_is_the_one_described() -> None:
    assert f"{EPS_GRID[0]:.2f}, {EPS_GRID[1]:.2f} .. {EPS_GRID[-1]:.2f}" in PAGES["method"]


@pytest.mark.parametrize("name", SCHEMA.names)
def test_every_column_is_described_with_its_type(name: str) -> None:
    column = SCHEMA.field(name)
    null = "unknown" if column.nullable else "MUST NOT"
    assert f"| `{name}` | {column.type} | {null} |" in PAGES["crop-store"]


@pytest.mark.parametrize("name", [entry.name for entry in fields(CropStore)])
def test_every_field_of_a_store_in_memory_is_described(name: str) -> None:
    assert f"| `{name}` |" in PAGES["crop-store"]


def test_splits_and_version_key_are_given() -> None:
    assert VERSION_KEY.decode() in PAGES["crop-store"] and set(COLUMNS) < {entry.name for entry in fields(CropStore)}
    assert all(f"`{split}`" in PAGES["crop-store"] for split in SPLITS)


def test_both_examples_make_a_store_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGES["crop-store"], re.DOTALL)
    assert len(examples) == 2
    tables = []
    for example in examples:
        for crop in re.findall(r'"(crops/[^"]+)"', example):
            (tmp_path / "my-site" / crop).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 64)).save(tmp_path / "my-site" / crop)
        exec(example, {})
        tables.append(pq.read_table("my-site/index.parquet").drop_columns(["time_s", "track"]))
        store = open_store(tmp_path / "my-site")["train"]
        assert store.camera_names == ("entrance", "hall") and store.read(1)[:2] == b"\xff\xd8"
    assert tables[0].equals(tables[1])


def test_every_file_and_key_of_a_checkpoint_is_described() -> None:
    page = PAGES["checkpoint"]
    keys = ["schema_version", "encoder", "provenance", "versions"]
    keys += [entry.name for kind in (Provenance, EncoderConfig) for entry in fields(kind)]
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    assert all(name in page for name in (INDEX_FILE, MODEL_FILE, RESUME_FILE, *BACKBONES))


def test_the_schedule_described_is_the_one_that_runs() -> None:
    purify = load_recipe("purify")
    schedule = f"{purify.epochs} epochs of {purify.iters} batches of {purify.batch} ({purify.instances} a cluster)"
    assert schedule in " ".join(PAGES["method"].split())
