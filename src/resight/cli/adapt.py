"""`resight adapt` and the command that made the built-in weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from resight.cli.options import RECIPES_HELP, WEIGHTS_HELP, DeviceOption, JsonOption, SiteOption, write_json

if TYPE_CHECKING:
    from resight.encoder.checkpoint import Checkpoint
    from resight.encoder.weights import InitialWeights
    from resight.training.adaptation.run import RunLog
    from resight.training.store.crops import CropStore
    from resight.training.store.datasets import Site
    from resight.training.store.links import Links

log = logging.getLogger(__name__)


def adapt(
    site: SiteOption,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; the teacher is written to OUT-teacher.")],
    init: Annotated[str, typer.Option(help=f"Initial weights: {WEIGHTS_HELP}")] = "builtin",
    recipe: Annotated[str, typer.Option(help=f"Method: {RECIPES_HELP}.")] = "purify-camera",
    student: Annotated[
        str | None,
        typer.Option(help="Distil into a student with other weights: osnet_x0_25, or as for --init."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Use the schedule of the paper instead of one for small machines.")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each stage. [default: the recipe's]")] = None,
    iters: Annotated[int | None, typer.Option(min=1, help="Batches per epoch. [default: the recipe's]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random number generators.")] = 1,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the last finished epoch.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Adapt a model to a site's unlabelled crops.

    Example: `resight adapt --site crops/ --init builtin --out site-model`

    Example: `resight adapt --site crops/ --recipe o2cap --set cluster.eps=0.5 --set iters=40 --out site-model`

    Example: `resight adapt --site crops/ --init resnet50 --student osnet_x0_25 --out small-model`

    Example: `torchrun --nproc-per-node 4 -m resight adapt --device cuda --set batch=256 --site crops/ --out site-model`
    """
    from resight.encoder.weights import load_weights
    from resight.training.adaptation.adapt import adapt as run_adaptation
    from resight.training.adaptation.checkpoints import Adaptation
    from resight.training.adaptation.recipe import change_recipe, load_recipe
    from resight.training.adaptation.run import RunLog, TrainingRun
    from resight.training.features.distributed import on_first_process, process_group, rank
    from resight.training.features.extract import require_device

    require_device(device)
    out = out.absolute()  # `.` has no name to append `-teacher` to
    method = load_recipe(recipe, published=published).with_schedule(epochs=epochs, iters=iters)
    if student is not None:
        method = method.with_student()
    method = change_recipe(method, changes or ())
    folder, report = out.with_name(f"{out.name}-log"), out.with_name(f"{out.name}-log") / "report.html"
    with process_group(device) as device:
        console = Console(stderr=True, quiet=rank() > 0)
        opened, store, links = on_first_process(lambda: _open_usable_site(site))
        initial = load_weights(init)
        smaller = load_weights(student) if student is not None else None
        console.print(
            f"{len(store)} crops from {len(store.camera_names)} cameras of {opened.name}, recipe {method.name}, "
            f"{len(links)} links"
        )
        with RunLog(folder, console=console, append=resume, silent=rank() > 0) as runlog:
            run = TrainingRun(store, method, seed, device, runlog, links=links)
            plan = Adaptation(run, initial, out, smaller)
            checkpoint = run_adaptation(plan, resume=resume)
        if rank():
            return
    # only the first process continues
    with RunLog(folder, console=console, append=True) as runlog:
        _write_report(report, opened, store, initial, checkpoint, runlog, device)
    last = dict(checkpoint.provenance.history[-1])
    console.print(
        f"wrote {out}; report, figures and TensorBoard files in {folder}. Next: resight export {out} --out BUNDLE"
    )
    write_json(json_file, {"checkpoint": str(out), "last_epoch": last, "report": str(report)})


def _write_report(
    path: Path,
    site: Site,
    store: CropStore,
    initial: InitialWeights,
    checkpoint: Checkpoint,
    runlog: RunLog,
    device: str,
) -> None:
    """Write the report of an adaptation; with scores before and after if the persons are known."""
    from resight.training.report.adaptation import write_adaptation_report
    from resight.training.report.ranked_lists import measure_before_after

    title = f"{site.name}: adapted by {checkpoint.provenance.recipe['name']}"
    scores = measure_before_after(site, initial.encoder, checkpoint.encoder, device=device)
    shown = vars(scores) if scores else {}
    with runlog.progress("features for the report", len(store)) as advance:
        write_adaptation_report(
            path, store, checkpoint, path.parent, title=title, device=device, progress=advance, **shown
        )


def _open_usable_site(site: Path) -> tuple[Site, CropStore, Links]:
    """A site, its decodable training crops, and the links between them."""
    from resight.training.store.crops import usable_crops
    from resight.training.store.datasets import open_site
    from resight.training.store.links import links_of

    opened = open_site(site)
    store = usable_crops(opened.train)
    return opened, store, links_of(store)


def builtin_weights(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    site: Annotated[Path, typer.Option(help="Folder for the synthetic site.")] = Path("builtin-site"),
    seed: Annotated[int, typer.Option(min=0)] = 1,
    device: DeviceOption = "cpu",
) -> None:
    """Train the built-in weights on synthetic people (docs/weights.md).

    Example: `resight builtin-weights --out src/resight/encoder/builtin`
    """
    from resight.training.synthetic.builtin_weights import train_builtin

    train_builtin(out, site, seed=seed, device=device, console=Console(stderr=True))
