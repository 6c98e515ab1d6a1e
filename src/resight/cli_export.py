"""The command ``resight export``: a checkpoint folder becomes a bundle folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from resight.cli_json import JsonOption, write_json

if TYPE_CHECKING:
    from resight.bundle import Bundle
    from resight.export_site import Lender

MEASURED = (("images_per_s", ".0f"), ("mean_cosine", ".4f"), ("mAP", ".3f"))
COLUMNS = (
    "file",
    "precision",
    "MiB",
    "min cosine",
    "max diff",
    "crops/s",
    "site cosine",
    "mAP",
)
PRECISION_HELP = "Forms to make, with commas: fp32 (always made), fp16, int8; or auto: what can be made and helps here."
SITE_HELP = "Unlabelled crops of the site: calibrates INT8 and what a similarity means."
EVALUATION_HELP = "Site whose persons are known: mAP of every form, and INT8 may lose 1 point at most."
TENSORRT_HELP = "Also make TensorRT's INT8 form and, on a machine with TensorRT, its engines."
REPORT_HELP = "Page with all figures and the reliability curve. [default: OUT-report.html where --site is given]"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder that `resight adapt` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Bundle folder to make.")],
    precision: Annotated[str, typer.Option(help=PRECISION_HELP)] = "fp32",
    site: Annotated[Path | None, typer.Option("--site", help=SITE_HELP)] = None,
    evaluation: Annotated[Path | None, typer.Option("--evaluation", help=EVALUATION_HELP)] = None,
    tensorrt: Annotated[bool, typer.Option("--tensorrt", help=TENSORRT_HELP)] = False,
    sign_key: Annotated[Path | None, typer.Option("--sign-key", help="Private key that signs the bundle.")] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="F.html", help=REPORT_HELP)] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's own by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let a bundle already there give way.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Export a checkpoint to a self-checking bundle for `resight serve`.

    Example: `resight export site-model --out site.bundle --site crops/ --precision fp32,fp16,int8`
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from resight.cli_bundle import load_key
    from resight.exporters.export import export_checkpoint
    from resight.exporters.forms import Wanted, steps

    wanted = Wanted.parse(precision, crops=site is not None, tensorrt=tensorrt)
    key = load_key(sign_key) if sign_key is not None else None
    console = Console(stderr=True)
    columns = (TextColumn("export"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("checkpoint", total=None)
        lender = _lender(checkpoint, site, evaluation)
        lent = lender.lend(crops="int8" in wanted.precisions)
        told = steps(wanted, lent)
        bar.update(task, total=len(told) + 1, advance=1)
        bundle = export_checkpoint(
            checkpoint,
            out,
            name=name,
            wanted=wanted,
            lent=lent,
            key=key,
            replace=replace,
            progress=lambda step: bar.update(task, description=step, completed=1 + told.index(step)),
        )
        bar.update(task, description="done", completed=len(told) + 1)
    engines = _engines(bundle, console) if tensorrt else []
    Console().print(_table(bundle))
    for line in _slower(bundle):
        Console().print(line, highlight=False, markup=False)
    for file, reason in bundle.manifest.evaluation["left_out"].items():
        Console().print(f"left out: {file}: {reason}", highlight=False, markup=False)
    if report is None and site is not None:
        report = out.with_name(f"{out.name}-report.html")
    if report is not None:
        from resight.training.export_report import write_export_report

        write_export_report(report, bundle, COLUMNS, _rows(bundle), lender.reliability)
        Console().print(f"report: {report}", highlight=False, markup=False)
    write_json(json_file, _figures(bundle) | {"engines": engines, "report": None if report is None else str(report)})


def _lender(checkpoint: Path, site: Path | None, evaluation: Path | None) -> Lender:
    """The site, opened; mistakes in it are told before anything is computed."""
    from resight.checkpoint import load_checkpoint
    from resight.export_site import Lender

    spec = load_checkpoint(checkpoint).encoder.config.image
    if site is None and evaluation is None:
        return Lender(None, spec)
    from resight.training.datasets import open_site

    store = None if site is None else open_site(site).train
    return Lender(store, spec, None if evaluation is None else open_site(evaluation))


def _engines(bundle: Bundle, console: Console) -> list[dict[str, Any]]:
    """Build TensorRT's engines into this machine's cache; where TensorRT is absent, say so and go on."""
    from resight.errors import StartupError
    from resight.exporters.to_tensorrt import build_engines

    try:
        return [vars(engine) for engine in build_engines(bundle)]
    except StartupError as error:
        console.print(f"no engines were built: {error}", style="yellow", highlight=False, markup=False)
        return []


def _rows(bundle: Bundle) -> list[list[str]]:
    """Every form as words, in the order of `COLUMNS`."""
    rows = []
    for artefact in bundle.manifest.artefacts:
        figures = bundle.manifest.evaluation["forms"][artefact.file]
        told = [f"{figures[key]:{spell}}" if key in figures else "-" for key, spell in MEASURED]
        size = f"{(bundle.path / artefact.file).stat().st_size / 2**20:.2f}"
        parity = [f"{artefact.min_cosine:.4f}", f"{artefact.max_abs_diff:.0e}"]
        rows.append([artefact.file, artefact.precision, size, *parity, *told])
    return rows


def _table(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    title = f"bundle {manifest.name}, space {manifest.space_id[:12]}, {manifest.feature_dim} numbers a person"
    table = Table(title=title, caption=_calibrated(bundle), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        words = column in ("file", "precision")
        table.add_column(column, justify="left" if words else "right", no_wrap=words, overflow="fold")
    for row in _rows(bundle):
        table.add_row(*row)
    return table


def _slower(bundle: Bundle) -> list[str]:
    """What is no gain on this machine."""
    forms = bundle.manifest.evaluation["forms"]
    base = forms["model.onnx"]["images_per_s"]
    return [
        f"mind: {file} runs at {figures['images_per_s'] / base:.2f} of the speed of fp32 on this machine"
        for file, figures in forms.items()
        if figures.get("images_per_s", base) < base
    ]


def _calibrated(bundle: Bundle) -> str:
    """The thresholds, or that there are none."""
    calibration = bundle.manifest.calibration
    if calibration is None:
        return "similarities are not calibrated: --site gives the crops for it"
    accept, reject = (float(calibration.similarity(p)) for p in (calibration.accept, calibration.reject))
    return f"match from similarity {accept:.3f} on, unknown below {reject:.3f}"


def _figures(bundle: Bundle) -> dict[str, Any]:
    """What ``--json`` writes."""
    manifest = bundle.manifest
    forms = [
        {
            "file": artefact.file,
            "precision": artefact.precision,
            "runtime": artefact.runtime,
            "bytes": (bundle.path / artefact.file).stat().st_size,
            "min_cosine": artefact.min_cosine,
            "max_abs_diff": artefact.max_abs_diff,
            "measured": manifest.evaluation["forms"][artefact.file],
        }
        for artefact in manifest.artefacts
    ]
    return {
        "bundle": str(bundle.path),
        "name": manifest.name,
        "space_id": manifest.space_id,
        "feature_dim": manifest.feature_dim,
        "artefacts": forms,
        "left_out": manifest.evaluation["left_out"],
        "calibration": manifest.calibration and manifest.calibration.to_json(),
        "signer": manifest.signer,
    }
