"""`resight export`: a checkpoint folder becomes a bundle folder.

Crops of the site are used to calibrate INT8 and similarities, and a site with known persons to measure mAP.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from resight.arrays import Pixels
from resight.bundle.probes import EmbedBatch
from resight.calibration import Calibration
from resight.cli.options import JsonOption, write_json
from resight.image import ImageSpec

if TYPE_CHECKING:
    from resight.bundle.bundle import Bundle
    from resight.exporters.forms import SiteData
    from resight.training.calibration.reliability import Reliability
    from resight.training.store.crops import CropStore
    from resight.training.store.datasets import Site


log = logging.getLogger(__name__)

INT8_CROPS = 256  # as many as `resight.exporters.int8` takes: one in four to compare, of the others 128 to calibrate
PAIR_CROPS = 6000  # whole tracks up to this many: pairs enough for 1 in 1,000 (resight.training.store.track_pairs)


@dataclass
class SiteDataLoader:
    """The data of a site for `resight.exporters.export`.

    Attributes:
        store: unlabelled crops of the site.
        spec: the encoder's image size.
        evaluation: a site with known persons, if any.
        reliability: of the fitted calibration, for the report.
    """

    store: CropStore | None
    spec: ImageSpec
    evaluation: Site | None = None
    reliability: Reliability | None = field(default=None, init=False)

    def load(self, *, crops: bool) -> SiteData:
        """The available data; ``crops`` also decodes the crops that INT8 needs.

        Raises:
            ImageError: a crop cannot be decoded.
            SiteError: the persons of the evaluation set are not known.
        """
        from resight.exporters.forms import SiteData

        if self.evaluation is not None:
            from resight.training.evaluation.evaluate import evaluation_splits

            evaluation_splits(self.evaluation)  # fails before anything is computed
        return SiteData(
            fitted_pixels(sample_crops(self.store, INT8_CROPS), self.spec)
            if crops and self.store is not None
            else None,
            self.calibrate if self.store is not None else None,
            self.measure if self.evaluation is not None else None,
        )

    def calibrate(self, run: EmbedBatch) -> Calibration | None:
        """Fit the calibration of similarities; None, with a warning, if the site does not allow it."""
        from resight.training.calibration.fit import calibrate
        from resight.training.features.extract import embed_store

        assert self.store is not None
        store = sample_tracks(self.store, PAIR_CROPS)
        calibration, self.reliability = calibrate(embed_store(store, self.spec, run), store)
        return calibration

    def measure(self, run: EmbedBatch) -> float:
        """MAP, 0..1, on the evaluation set."""
        from resight.training.evaluation.evaluate import evaluate_site
        from resight.training.features.extract import embed_store

        assert self.evaluation is not None
        return float(evaluate_site(self.evaluation, lambda store: embed_store(store, self.spec, run)).mAP)


def sample_crops(store: CropStore, limit: int) -> CropStore:
    """At most ``limit`` crops, spread evenly over the cameras; the choice is deterministic."""
    from resight.training.store.track_pairs import sample_evenly

    order = np.argsort(store.cameras, kind="stable")
    sizes = np.bincount(store.cameras, minlength=len(store.camera_names))
    camera, number = sample_evenly(sizes, limit, np.random.default_rng(0))
    return store.subset(np.sort(order[(np.cumsum(sizes) - sizes)[camera] + number]))


def sample_tracks(store: CropStore, limit: int) -> CropStore:
    """Random whole tracks, up to ``limit`` crops; all crops if there are no more, any crops if there are no tracks."""
    from resight.training.store.track_pairs import number_tracks

    tracks = number_tracks(store.cameras, store.tracks)
    if len(store) <= limit:
        return store
    if tracks.max(initial=-1) < 0:
        return sample_crops(store, limit)
    place = np.random.default_rng(0).permutation(int(tracks.max()) + 1)  # of each track in the draw
    known = np.flatnonzero(tracks >= 0)
    drawn = known[np.argsort(place[tracks[known]], kind="stable")][:limit]
    return store.subset(np.sort(drawn))


def fitted_pixels(store: CropStore, spec: ImageSpec) -> Pixels:
    """Crops as input of the graph, uint8 (N, H, W, 3)."""
    from resight.training.features.extract import read_batches

    return np.concatenate([pixels for _, pixels in read_batches(store, [np.arange(len(store))], spec)])


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
PRECISION_HELP = (
    "Comma-separated list of fp32 (always included), fp16, int8; or auto: those that are possible and faster here."
)
SITE_HELP = "Unlabelled crops of the site, to calibrate INT8 and similarities."
EVALUATION_HELP = "Site with known persons: measures mAP of every precision; INT8 may lose at most 1 point."
TENSORRT_HELP = "Also export TensorRT's INT8 graph and, if TensorRT is installed, build its engines."
REPORT_HELP = "HTML page with all figures and the reliability curve. [default: OUT-report.html with --site]"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder that `resight adapt` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Bundle folder to create.")],
    precision: Annotated[str, typer.Option(help=PRECISION_HELP)] = "fp32",
    site: Annotated[Path | None, typer.Option("--site", help=SITE_HELP)] = None,
    evaluation: Annotated[Path | None, typer.Option("--evaluation", help=EVALUATION_HELP)] = None,
    tensorrt: Annotated[bool, typer.Option("--tensorrt", help=TENSORRT_HELP)] = False,
    sign_key: Annotated[Path | None, typer.Option("--sign-key", help="Private key that signs the bundle.")] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="F.html", help=REPORT_HELP)] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. [default: name of the folder]")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing bundle.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Export a checkpoint to a self-checking bundle for `resight serve`.

    Example: `resight export site-model --out site.bundle --site crops/ --precision fp32,fp16,int8`
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from resight.cli.bundle import load_key
    from resight.exporters.export import export_checkpoint
    from resight.exporters.forms import ExportOptions, export_steps

    options = ExportOptions.parse(precision, crops=site is not None, tensorrt=tensorrt)
    key = load_key(sign_key) if sign_key is not None else None
    console = Console(stderr=True)
    columns = (TextColumn("export"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("checkpoint", total=None)
        loader = _site_data_loader(checkpoint, site, evaluation)
        site_data = loader.load(crops="int8" in options.precisions)
        steps = export_steps(options, site_data)
        bar.update(task, total=len(steps) + 1, advance=1)
        bundle = export_checkpoint(
            checkpoint,
            out,
            name=name,
            options=options,
            site=site_data,
            key=key,
            replace=replace,
            progress=lambda step: bar.update(task, description=step, completed=1 + steps.index(step)),
        )
        bar.update(task, description="done", completed=len(steps) + 1)
    engines = _build_engines(bundle, console) if tensorrt else []
    Console().print(_table(bundle))
    for line in _slower_forms(bundle):
        Console().print(line, highlight=False, markup=False)
    for file, reason in bundle.manifest.evaluation["left_out"].items():
        Console().print(f"left out: {file}: {reason}", highlight=False, markup=False)
    if report is None and site is not None:
        report = out.with_name(f"{out.name}-report.html")
    if report is not None:
        from resight.training.report.export import write_export_report

        write_export_report(report, bundle, COLUMNS, _rows(bundle), loader.reliability)
        Console().print(f"report: {report}", highlight=False, markup=False)
    write_json(json_file, _figures(bundle) | {"engines": engines, "report": None if report is None else str(report)})


def _site_data_loader(checkpoint: Path, site: Path | None, evaluation: Path | None) -> SiteDataLoader:
    """Open the sites; errors in them are raised before anything is computed."""
    from resight.encoder.checkpoint import load_checkpoint

    spec = load_checkpoint(checkpoint).encoder.config.image
    if site is None and evaluation is None:
        return SiteDataLoader(None, spec)
    from resight.training.store.datasets import open_site

    store = None if site is None else open_site(site).train
    return SiteDataLoader(store, spec, None if evaluation is None else open_site(evaluation))


def _build_engines(bundle: Bundle, console: Console) -> list[dict[str, Any]]:
    """Build TensorRT engines into the cache of this machine; only a warning if TensorRT is not installed."""
    from resight.errors import StartupError
    from resight.exporters.tensorrt import build_engines

    try:
        return [vars(engine) for engine in build_engines(bundle)]
    except StartupError as error:
        console.print(f"no engines were built: {error}", style="yellow", highlight=False, markup=False)
        return []


def _rows(bundle: Bundle) -> list[list[str]]:
    """Cells of every artefact, in the order of `COLUMNS`."""
    rows = []
    for artefact in bundle.manifest.artefacts:
        figures = bundle.manifest.evaluation["forms"][artefact.file]
        measured = [f"{figures[key]:{spell}}" if key in figures else "-" for key, spell in MEASURED]
        size = f"{(bundle.path / artefact.file).stat().st_size / 2**20:.2f}"
        parity = [f"{artefact.min_cosine:.4f}", f"{artefact.max_abs_diff:.0e}"]
        rows.append([artefact.file, artefact.precision, size, *parity, *measured])
    return rows


def _table(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    title = f"bundle {manifest.name}, space {manifest.space_id[:12]}, {manifest.feature_dim} values per feature"
    table = Table(title=title, caption=_calibration_caption(bundle), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        words = column in ("file", "precision")
        table.add_column(column, justify="left" if words else "right", no_wrap=words, overflow="fold")
    for row in _rows(bundle):
        table.add_row(*row)
    return table


def _slower_forms(bundle: Bundle) -> list[str]:
    """A note for every artefact that is slower than fp32 on this machine."""
    forms = bundle.manifest.evaluation["forms"]
    base = forms["model.onnx"]["images_per_s"]
    return [
        f"note: {file} runs at {figures['images_per_s'] / base:.2f} times the speed of fp32 on this machine"
        for file, figures in forms.items()
        if figures.get("images_per_s", base) < base
    ]


def _calibration_caption(bundle: Bundle) -> str:
    """The thresholds, or a note that there are none."""
    calibration = bundle.manifest.calibration
    if calibration is None:
        return "similarities are not calibrated: pass crops with --site"
    accept, reject = (float(calibration.similarity(p)) for p in (calibration.accept, calibration.reject))
    return f"match from similarity {accept:.3f} on, unknown below {reject:.3f}"


def _figures(bundle: Bundle) -> dict[str, Any]:
    """The content of ``--json``."""
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
