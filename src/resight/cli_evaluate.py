"""`resight evaluate`: how well a model tells a site's known persons apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli_json import JsonOption, write_json
from resight.cli_train import WEIGHTS_HELP, DeviceOption, SiteOption

if TYPE_CHECKING:
    from resight.model import Encoder
    from resight.training.crops import CropStore
    from resight.training.neighbours import Floats


def evaluate(
    model: Annotated[str, typer.Option(help=f"Bundle folder, or weights: {WEIGHTS_HELP}")],
    site: SiteOption,
    device: DeviceOption = "cpu",
    json_file: JsonOption = None,
) -> None:
    """Measure a model on a site whose persons are known: mAP, rank-1, -5, -10 and mINP in percent.

    Example: `resight evaluate --model site-model --site market/ --json figures.json`
    """
    from resight.training.datasets import open_site
    from resight.training.epoch import require_device
    from resight.training.evaluate import evaluate_site, percentages

    require_device(device)
    opened = open_site(site)
    score = evaluate_site(opened, lambda store: _embed(model, store, device))
    figures = percentages(score)
    table = Table("mAP", "rank-1", "rank-5", "rank-10", "mINP", title=f"{model} on {opened.name}")
    table.add_row(*(f"{value:.2f}" for value in figures.values()))
    Console().print(table)
    write_json(json_file, {**figures, "valid_queries": score.valid_queries})


def _embed(model: str, store: CropStore, device: str) -> Floats:
    """Features of a store by whatever kind of model this is."""
    import numpy as np

    from resight.bundle import is_bundle, open_bundle
    from resight.training.features import extract, read_batches
    from resight.weights import load_weights

    if not is_bundle(Path(model)):
        encoder: Encoder = load_weights(model).encoder.to(device)
        return extract(encoder, store, device=device, local=False)[0]
    from resight.service.runtime import OnnxRuntime

    bundle = open_bundle(Path(model))
    runtime = OnnxRuntime(bundle)
    batches = np.array_split(np.arange(len(store)), -(-len(store) // 32))
    return np.concatenate([runtime.embed(pixels) for _, pixels in read_batches(store, batches, bundle.manifest.image)])
