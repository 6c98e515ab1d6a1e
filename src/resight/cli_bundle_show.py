"""The commands ``resight bundle show`` and ``resight bundle diff``: a manifest as people read it."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.bundle import Bundle, open_bundle
from resight.bundle_diff import ProbeFigures, compare_probes, describe, differing_fields, flatten, shared_pixels
from resight.cli_json import JsonOption, write_json
from resight.errors import StartupError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from resight.calibration import Calibration
    from resight.image import Pixels

MAX_CELL = 1000  # characters; the rest is in the file of --json
BATCH = 7  # probes of one run

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder that `resight export` made.")]
FirstArgument = Annotated[Path, typer.Argument(metavar="A", help="Bundle folder.")]
SecondArgument = Annotated[Path, typer.Argument(metavar="B", help="Another.")]
RUNTIME_HELP = "Compare features of the golden images. [default: where onnxruntime is installed]"


def plain(value: object) -> str:
    """A value of a file that anybody may have written, for a terminal: no markup, no control sequences, not endless."""
    text = str(value)
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:MAX_CELL])
    return escape(shown + ("…" if len(text) > MAX_CELL else ""))


def megabytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**20:.2f} MiB"


def missing_packages() -> str:
    """What this machine lacks to run a graph; nothing where it has all."""
    return " and ".join(name for name in ("onnx", "onnxruntime") if find_spec(name) is None)


def show(folder: BundleArgument, json_file: JsonOption = None) -> None:
    """Tell what a bundle is, after every byte of it has been verified.

    Example: `resight bundle show lobby.bundle`
    """
    opened = open_bundle(folder)
    console = Console()
    for table in (_about(opened), _artefacts(opened), _figures(opened)):
        if table.row_count:
            console.print(table)
    write_json(json_file, {"bundle": str(folder), **describe(opened)})


def _about(opened: Bundle) -> Table:
    manifest = opened.manifest
    image, training = manifest.image, manifest.training
    recipe, weights = training.get("recipe"), training.get("initial_weights")
    lines: dict[str, object] = {
        "space": f"{manifest.space_id} (features compare only when it is equal)",
        "feature length": manifest.feature_dim,
        "image": f"{image.height} x {image.width} (height x width), {image.filter}",
        "similarity": calibration_words(manifest.calibration),
        "initial weights": (weights.get("name") if isinstance(weights, dict) else None) or "not told",
        "their licence": manifest.weights_licence,
        "recipe": (recipe.get("name") if isinstance(recipe, dict) else None) or "none",
        "stage and epoch": f"{training.get('stage', '-')}, {training.get('epoch', '-')}",
        "store fingerprint": training.get("store_fingerprint") or "none",
        "created": manifest.created,
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
        or "not told",
        "signer": manifest.signer or "none: not signed",
    }
    table = Table(show_header=False, title=f"bundle {plain(manifest.name)}")
    for name, value in lines.items():
        table.add_row(name, plain(value))
    return table


def _artefacts(opened: Bundle) -> Table:
    table = Table("file", "precision", "runtime", title="artefacts: features of the golden images against torch's")
    for column in ("size", "min cosine", "max difference"):
        table.add_column(column, justify="right")
    for one in opened.manifest.artefacts:
        size = (opened.path / one.file).stat().st_size
        figures = (megabytes(size), f"{one.min_cosine:.6f}", f"{one.max_abs_diff:.1e}")
        table.add_row(one.file, one.precision, one.runtime, *figures)
    return table


def _figures(opened: Bundle) -> Table:
    table = Table("figure", "value", title="evaluation")
    for name, value in flatten(opened.manifest.evaluation).items():
        table.add_row(plain(name), plain(f"{value:.4f}" if isinstance(value, float) else value))
    return table


def calibration_words(calibration: Calibration | None) -> str:
    """What a similarity means at the bundle's site, in a sentence or two."""
    if calibration is None:
        return "not calibrated: what a similarity means is for the caller to find out"
    of_one = f"{calibration.positives} pairs of one person ({calibration.positive_source})"
    of_two = f"{calibration.negatives} of two ({calibration.negative_source})"
    return (
        f"match from {_threshold(calibration, calibration.accept)} on, which at most "
        f"{calibration.false_accept_share:.3%} of pairs of two persons reach; unknown below "
        f"{_threshold(calibration, calibration.reject)}, as at most {calibration.false_reject_share:.3%} of pairs of "
        f"one person are; uncertain between. Fitted to {of_one} and {of_two}; calibration error {calibration.error:.3f}"
    )


def _threshold(calibration: Calibration, probability: float) -> str:
    similarity = float(calibration.similarity(probability))
    told = f"similarity {similarity:.3f}" if -1 <= similarity <= 1 else "a similarity that no pair has"
    return f"{told} (probability {probability:.3f} at even odds)"


def diff(
    first: FirstArgument,
    second: SecondArgument,
    runtime: Annotated[bool | None, typer.Option("--runtime/--no-runtime", help=RUNTIME_HELP)] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare two bundles: may their features be compared, and what differs.

    Example: `resight bundle diff active.bundle tonight.bundle`
    """
    one, other = open_bundle(first), open_bundle(second)
    comparable = one.manifest.space_id == other.manifest.space_id
    fields = differing_fields(one, other)
    lacking = missing_packages()
    if runtime and lacking:
        raise StartupError(f"--runtime needs {lacking}, found none: `pip install 'resight[cpu]'`, or leave it out")
    wanted = not lacking and runtime is not False
    figures = compare_probes(one, other, _embed) if wanted else []
    console = Console(highlight=False)
    if comparable:
        console.print("[bold green]comparable[/bold green]: both answer in one embedding space")
    else:
        console.print("[bold yellow]not comparable[/bold yellow]: two embedding spaces; a gallery must be migrated")
    table = Table("field", title=f"{len(fields)} fields differ")
    for column in ("A", "B"):
        table.add_column(column, overflow="fold")  # a hash cut short says nothing
    for name, (mine, theirs) in fields.items():
        table.add_row(plain(name), plain("-" if mine is None else mine), plain("-" if theirs is None else theirs))
    if fields:
        console.print(table)
    else:
        console.print("the manifests are equal")
    if figures:
        console.print(_probe_table(figures))
    elif wanted:
        console.print(f"no features compared: {_why_none(one, other)}")
    answer: dict[str, Any] = {"a": str(first), "b": str(second), "comparable": comparable}
    answer["fields"] = {name: {"a": mine, "b": theirs} for name, (mine, theirs) in fields.items()}
    write_json(json_file, answer | {"probes": [asdict(one) for one in figures]})


def _why_none(one: Bundle, other: Bundle) -> str:
    if one.manifest.image != other.manifest.image:
        return "their images are of two kinds"
    return "no golden image is in both" if not len(shared_pixels(one, other)) else "no precision is in both"


def _probe_table(figures: list[ProbeFigures]) -> Table:
    table = Table("precision", title="features of the same golden images")
    for column in ("images", "mean cosine", "min cosine", "mean similarity change", "max"):
        table.add_column(column, justify="right")
    for one in figures:
        cosines = ["-" if c is None else f"{c:.6f}" for c in (one.mean_cosine, one.min_cosine)]
        changes = [f"{one.mean_similarity_change:.4f}", f"{one.max_similarity_change:.4f}"]
        table.add_row(one.precision, str(one.probes), *cosines, *changes)
    return table


def _embed(opened: Bundle, precision: str, pixels: Pixels) -> NDArray[np.float32]:
    """On the CPU, where every form runs."""
    import numpy as np

    from resight.service.runtime import open_runtime

    runtime = open_runtime(opened, precision=precision, max_batch=BATCH)
    return np.concatenate([runtime.embed(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)])
