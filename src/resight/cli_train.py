"""`resight adapt` and the command that made the built-in weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from resight.cli_json import JsonOption, write_json

if TYPE_CHECKING:
    from resight.checkpoint import Checkpoint
    from resight.training.crops import CropStore
    from resight.training.datasets import Site
    from resight.training.links import Links
    from resight.training.runlog import RunLog
    from resight.weights import InitialWeights

log = logging.getLogger(__name__)

SITE_HELP = "Market-1501 folder, plain folder (one sub-folder a camera) or crop store."
SiteOption = Annotated[Path, typer.Option("--site", help=SITE_HELP)]
METHODS = "purify-camera (best), purify, o2cap, cluster-contrast, selective, supervised"
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
WEIGHTS_HELP = "'builtin', 'resnet18', 'resnet50', a .pth or .onnx file, or a checkpoint folder."


def adapt(
    site: SiteOption,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; the teacher goes to OUT-teacher.")],
    init: Annotated[str, typer.Option(help=f"Initial weights: {WEIGHTS_HELP}")] = "builtin",
    recipe: Annotated[str, typer.Option(help=f"Method: {METHODS}.")] = "purify-camera",
    student: Annotated[
        str | None,
        typer.Option(help="Distil into a student of other weights, for instance osnet_x0_25 or those --init takes."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The schedule of the method's paper instead of a small machine's.")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each stage; the recipe's by default.")] = None,
    iters: Annotated[int | None, typer.Option(min=1, help="Batches an epoch; the recipe's by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every stream of chance.")] = 1,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished epoch.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Adapt a model to a site's unlabelled crops.

    Example: `resight adapt --site crops/ --init builtin --out site-model`

    Example: `resight adapt --site crops/ --recipe o2cap --set cluster.eps=0.5 --set iters=40 --out site-model`

    Example: `resight adapt --site crops/ --init resnet50 --student osnet_x0_25 --out small-model`

    Example: `torchrun --nproc-per-node 4 -m resight adapt --device cuda --set batch=256 --site crops/ --out site-model`
    """
    from resight.training.adapt import Adaptation
    from resight.training.adapt import adapt as run_adaptation
    from resight.training.distributed import from_first, joined, rank
    from resight.training.recipe import change_recipe, load_recipe
    from resight.training.run import Run, require_device
    from resight.training.runlog import RunLog
    from resight.weights import load_weights

    require_device(device)
    out = out.absolute()  # `.` has no name to put `-teacher` behind
    method = load_recipe(recipe, published=published).with_schedule(epochs=epochs, iters=iters)
    if student is not None:
        method = method.with_student()
    method = change_recipe(method, changes or ())
    folder, report = out.with_name(f"{out.name}-log"), out.with_name(f"{out.name}-log") / "report.html"
    with joined(device) as device:
        console = Console(stderr=True, quiet=rank() > 0)
        opened, store, links = from_first(lambda: _usable(site))
        initial = load_weights(init)
        smaller = load_weights(student) if student is not None else None
        console.print(
            f"{len(store)} crops from {len(store.camera_names)} cameras of {opened.name}, recipe {method.name}, "
            f"{len(links)} links"
        )
        with RunLog(folder, console=console, append=resume, silent=rank() > 0) as runlog:
            run = Run(store, method, seed, device, runlog, links=links)
            plan = Adaptation(run, initial, out, smaller)
            checkpoint = run_adaptation(plan, resume=resume)
        if rank():
            return
    # alone from here on
    with RunLog(folder, console=console, append=True) as runlog:
        _report(report, opened, store, initial, checkpoint, runlog, device)
    last = dict(checkpoint.provenance.history[-1])
    console.print(
        f"wrote {out}; report, figures and TensorBoard files in {folder}. Next: resight export {out} --out BUNDLE"
    )
    write_json(json_file, {"checkpoint": str(out), "last_epoch": last, "report": str(report)})


def _report(
    path: Path,
    site: Site,
    store: CropStore,
    initial: InitialWeights,
    checkpoint: Checkpoint,
    runlog: RunLog,
    device: str,
) -> None:
    """The page about a finished adaptation; where persons are known, with figures before and after."""
    from resight.training.measured import measure_both
    from resight.training.story import write_adaptation_report

    title = f"{site.name}: adapted by {checkpoint.provenance.recipe['name']}"
    found = measure_both(site, initial.encoder, checkpoint.encoder, device=device)
    shown = vars(found) if found else {}
    with runlog.bar("features for the report", len(store)) as advance:
        write_adaptation_report(
            path, store, checkpoint, path.parent, title=title, device=device, progress=advance, **shown
        )


def _usable(site: Path) -> tuple[Site, CropStore, Links]:
    """A site, those of its training crops that can be decoded, and the links between them."""
    from resight.training.crops import usable_crops
    from resight.training.datasets import open_site
    from resight.training.links import links_of

    opened = open_site(site)
    store = usable_crops(opened.train)
    return opened, store, links_of(store)


def builtin_weights(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    site: Annotated[Path, typer.Option(help="Where the synthetic people are drawn.")] = Path("builtin-site"),
    seed: Annotated[int, typer.Option(min=0)] = 1,
    device: DeviceOption = "cpu",
) -> None:
    """Train the weights that ship with resight, from nothing but people drawn by code (docs/weights.md).

    Example: `resight builtin-weights --out src/resight/weights/builtin`
    """
    from resight.training.builtin import train_builtin

    train_builtin(out, site, seed=seed, device=device, console=Console(stderr=True))
