"""The weights that ship with resight: OSNet x0.25, trained with labels on synthetic people.

They do not depend on any licensed data, and the cameras of the demo's site were not used. docs/weights.md has the
command, its run time and the results.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console

from resight.encoder.checkpoint import Provenance, load_checkpoint, write_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import InitialWeights
from resight.image import ImageSpec
from resight.training.adaptation.adapt import adapt
from resight.training.adaptation.checkpoints import Adaptation
from resight.training.adaptation.recipe import Recipe, load_recipe
from resight.training.adaptation.run import RunLog, TrainingRun
from resight.training.evaluation.evaluate import evaluate_site, percentages
from resight.training.features.extract import extract_features
from resight.training.synthetic.site import SiteSettings, render_site

SOURCE_SITE = SiteSettings(
    "source", train_persons=700, test_persons=60, strangers=20, cameras=16, visits=(3, 6), crops=4
)
ENCODER = EncoderConfig("osnet_x0_25", "gem", 256, ImageSpec(128, 64))  # the size of the synthetic crops
LICENCE = "Apache-2.0"


def train_builtin(
    out: Path,
    site: Path,
    *,
    seed: int,
    device: str,
    console: Console,
    settings: SiteSettings = SOURCE_SITE,
    recipe: Recipe | None = None,
) -> dict[str, float]:
    """Render the source world, train with its labels and write the weights.

    Args:
        out: checkpoint folder to write; replaced if it is one.
        site: folder for the drawn crops; must not exist or be empty.
        seed: of the people, the cameras and the training.
        device: where to train.
        console: where progress goes.
        settings: how many people and cameras.
        recipe: a supervised one; by default the one of that name.

    Returns:
        Metrics in percent on other people seen by the same cameras.
    """
    source = render_site(site, settings, seed=seed)
    torch.manual_seed(seed)  # the only random initialisation in resight
    initial = InitialWeights(Encoder(ENCODER).eval(), {"name": "random", "sha256": "", "licence": LICENCE})
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "log", console=console) as log:
        plan = Adaptation(
            TrainingRun(source.train, recipe or load_recipe("supervised"), seed, device, log),
            initial,
            Path(folder) / "run",
        )
        trained = adapt(plan)
        encoder = load_checkpoint(plan.out, device=device).encoder
    metrics = percentages(
        evaluate_site(source, lambda store: extract_features(encoder, store, device=device, local=False)[0])
    )
    provenance = trained.provenance
    # Only the last line of the history is shipped.
    final = {**provenance.history[-1], **{f"source_{name}": value for name, value in metrics.items()}}
    source_of = {"name": "resight builtin", "sha256": "", "licence": LICENCE}
    write_checkpoint(
        out,
        trained.encoder,
        Provenance(provenance.recipe, "initial", provenance.epoch, provenance.store_fingerprint, source_of, (final,)),
    )
    console.print(metrics)
    return metrics
