"""`resight bundle`: verify, show, compare and sign bundles, and create keys for signing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resight.bundle.bundle import Bundle, open_bundle, sign_bundle
from resight.bundle.diff import (
    ProbeComparison,
    compare_probes,
    describe,
    differing_fields,
    flatten,
    shared_pixels,
)
from resight.bundle.signing import (
    PrivateKey,
    generate_key,
    is_encrypted,
    load_private_key,
    load_public_keys,
    public_path,
)
from resight.cli.options import JsonOption, write_json
from resight.errors import BundleError, StartupError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from resight.arrays import Pixels
    from resight.bundle.manifest import Artefact
    from resight.bundle.probes import Probes
    from resight.calibration import Calibration


MAX_CELL = 1000  # characters; the rest is in the file of --json
DIFF_BATCH = 7  # probes of one run

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder that `resight export` made.")]
FirstArgument = Annotated[Path, typer.Argument(metavar="A", help="Bundle folder.")]
SecondArgument = Annotated[Path, typer.Argument(metavar="B", help="Bundle folder to compare with.")]
DIFF_RUNTIME_HELP = "Compare features of the golden images. [default: if onnxruntime is installed]"


def escaped(value: object) -> str:
    """An untrusted value for a terminal: without markup and control sequences, and of limited length."""
    text = str(value)
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:MAX_CELL])
    return escape(shown + ("…" if len(text) > MAX_CELL else ""))


def megabytes(size: int) -> str:
    """A size in bytes, as text in MiB."""
    return f"{size / 2**20:.2f} MiB"


def missing_packages() -> str:
    """The packages missing on this machine to run a graph; empty if none."""
    return " and ".join(name for name in ("onnx", "onnxruntime") if find_spec(name) is None)


def show(folder: BundleArgument, json_file: JsonOption = None) -> None:
    """Show the manifest of a bundle, after verifying the hashes of all files.

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
        "similarity": describe_calibration(manifest.calibration),
        "initial weights": (weights.get("name") if isinstance(weights, dict) else None) or "unknown",
        "licence of the weights": manifest.weights_licence,
        "recipe": (recipe.get("name") if isinstance(recipe, dict) else None) or "none",
        "stage and epoch": f"{training.get('stage', '-')}, {training.get('epoch', '-')}",
        "store fingerprint": training.get("store_fingerprint") or "none",
        "created": manifest.created,
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())) or "unknown",
        "signer": manifest.signer or "none: not signed",
    }
    table = Table(show_header=False, title=f"bundle {escaped(manifest.name)}")
    for name, value in lines.items():
        table.add_row(name, escaped(value))
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
        table.add_row(escaped(name), escaped(f"{value:.4f}" if isinstance(value, float) else value))
    return table


def describe_calibration(calibration: Calibration | None) -> str:
    """The calibration of similarities, as text."""
    if calibration is None:
        return "not calibrated: the caller has to choose thresholds"
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
    text = f"similarity {similarity:.3f}" if -1 <= similarity <= 1 else "a similarity that no pair has"
    return f"{text} (probability {probability:.3f} at even odds)"


def diff(
    first: FirstArgument,
    second: SecondArgument,
    runtime: Annotated[bool | None, typer.Option("--runtime/--no-runtime", help=DIFF_RUNTIME_HELP)] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare two bundles: whether their features are comparable, and which fields differ.

    Example: `resight bundle diff active.bundle tonight.bundle`
    """
    one, other = open_bundle(first), open_bundle(second)
    comparable = one.manifest.space_id == other.manifest.space_id
    fields = differing_fields(one, other)
    lacking = missing_packages()
    if runtime and lacking:
        raise StartupError(f"--runtime needs {lacking}, found none: `pip install 'resight[cpu]'`, or omit the option")
    compared = not lacking and runtime is not False
    figures = compare_probes(one, other, _embed) if compared else []
    console = Console(highlight=False)
    if comparable:
        console.print("[bold green]comparable[/bold green]: both have the same embedding space")
    else:
        console.print(
            "[bold yellow]not comparable[/bold yellow]: different embedding spaces; a gallery must be migrated"
        )
    table = Table("field", title=f"{len(fields)} fields differ")
    for column in ("A", "B"):
        table.add_column(column, overflow="fold")  # a truncated hash is useless
    for name, (mine, theirs) in fields.items():
        table.add_row(escaped(name), escaped("-" if mine is None else mine), escaped("-" if theirs is None else theirs))
    if fields:
        console.print(table)
    else:
        console.print("the manifests are equal")
    if figures:
        console.print(_probe_table(figures))
    elif compared:
        console.print(f"no features compared: {_why_not_compared(one, other)}")
    result: dict[str, Any] = {"a": str(first), "b": str(second), "comparable": comparable}
    result["fields"] = {name: {"a": mine, "b": theirs} for name, (mine, theirs) in fields.items()}
    write_json(json_file, result | {"probes": [asdict(one) for one in figures]})


def _why_not_compared(one: Bundle, other: Bundle) -> str:
    if one.manifest.image != other.manifest.image:
        return "their image sizes or filters differ"
    return "they share no golden image" if not len(shared_pixels(one, other)) else "they share no precision"


def _probe_table(figures: list[ProbeComparison]) -> Table:
    table = Table("precision", title="features of the same golden images")
    for column in ("images", "mean cosine", "min cosine", "mean similarity change", "max"):
        table.add_column(column, justify="right")
    for one in figures:
        cosines = ["-" if c is None else f"{c:.6f}" for c in (one.mean_cosine, one.min_cosine)]
        changes = [f"{one.mean_similarity_change:.4f}", f"{one.max_similarity_change:.4f}"]
        table.add_row(one.precision, str(one.probes), *cosines, *changes)
    return table


def _embed(opened: Bundle, precision: str, pixels: Pixels) -> NDArray[np.float32]:
    """Embed on the CPU, which runs every precision."""
    import numpy as np

    from resight.runtime.providers import open_runtime

    runtime = open_runtime(opened, precision=precision, max_batch=DIFF_BATCH)
    return np.concatenate([runtime.embed(pixels[i : i + DIFF_BATCH]) for i in range(0, len(pixels), DIFF_BATCH)])


bundle = typer.Typer(help="Verify, show, compare and sign bundles.", no_args_is_help=True)
KEYS_HELP = "Trusted public key or .pub file; may be repeated. The signature must be by one of them."
VERIFY_RUNTIME_HELP = "Run the graphs on the probes. [default: if onnxruntime is installed]"
PASSPHRASE = "RESIGHT_KEY_PASSPHRASE"
PASSPHRASE_HELP = f"Encrypt the private key; the passphrase is prompted for, or read from {PASSPHRASE}."
RESULT_COLOURS = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
VERIFY_BATCH = 7  # the larger of the probes' batch sizes


class _VerificationSteps:
    """The checks of a bundle in order, with their results; all of them are shown even if a later one fails."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def add(self, result: str, step: str, found: str) -> None:
        self.rows.append({"step": step, "result": result, "found": found})

    @contextmanager
    def during(self, step: str, file: str = "") -> Iterator[None]:
        """Record a BundleError of the block as a failed step, and add the file to its message."""
        try:
            yield
        except BundleError as error:
            named = error if file in str(error) else BundleError(f"{file}: {error}")
            self.add("failed", step, str(named))
            raise named from error

    def table(self, title: str) -> Table:
        table = Table("step", "result", "found", title=title)
        for row in self.rows:
            colour = RESULT_COLOURS[row["result"]]
            table.add_row(escaped(row["step"]), f"[{colour}]{row['result']}[/{colour}]", escaped(row["found"]))
        return table


def verify(
    folder: BundleArgument,
    key: Annotated[list[str] | None, typer.Option(metavar="PUB", help=KEYS_HELP)] = None,
    runtime: Annotated[bool | None, typer.Option("--runtime/--no-runtime", help=VERIFY_RUNTIME_HELP)] = None,
    json_file: JsonOption = None,
) -> None:
    """Check hashes, signature and graphs, and whether the graphs reproduce their golden features on this machine.

    Example: `resight bundle verify lobby.bundle --key site.key.pub`
    """
    keys = load_public_keys(key or ())
    steps, verified = _VerificationSteps(), False
    try:
        _verify(folder, keys, runtime, steps)
        verified = True
    finally:
        Console().print(steps.table(f"{escaped(folder)} is {'verified' if verified else 'refused'}"))
        write_json(json_file, {"bundle": str(folder), "verified": verified, "keys": keys, "steps": steps.rows})


def _verify(folder: Path, keys: tuple[str, ...], runtime: bool | None, steps: _VerificationSteps) -> None:
    with steps.during("files and signature"):
        opened = open_bundle(folder, trusted_keys=keys)
    manifest = opened.manifest
    sizes = [path.stat().st_size for path in folder.iterdir()]
    steps.add("ok", "files", f"{len(sizes)} files, {megabytes(sum(sizes))}, none changed, missing or added")
    if manifest.signer:
        trust = "a key you trust" if keys else "a key that is not known to be trusted: pass trusted keys with --key"
        steps.add("ok", "signature", f"by {manifest.signer}, {trust}")
    else:
        steps.add("skipped", "signature", "none: anyone with write access can replace the bundle")
    lacking = missing_packages()
    if runtime and lacking:
        raise StartupError(f"--runtime needs {lacking}, found none: `pip install 'resight[cpu]'`, or omit the option")
    if lacking:
        steps.add("skipped", "graph", f"not read: {lacking} is not installed")
    else:
        _check_graphs(opened, steps)
    with steps.during("probes", manifest.probes.file):
        probes = opened.probes()
    if lacking or runtime is False:
        why = f"{lacking} is not installed: `pip install 'resight[cpu]'`" if lacking else "--no-runtime"
        steps.add("skipped", "probes", f"{len(probes.jpegs)} golden images read, not run: {why}")
        return
    for artefact in manifest.artefacts:
        _run_probes(opened, artefact, probes, steps)


def _check_graphs(opened: Bundle, steps: _VerificationSteps) -> None:
    """Check every graph like a runtime before loading it."""
    from resight.bundle.graph_check import check_graph

    manifest = opened.manifest
    for artefact in manifest.artefacts:
        with steps.during("graph", artefact.file):
            check_graph(opened.read(artefact.precision, artefact.runtime), manifest.image, manifest.feature_dim)
        steps.add("ok", "graph", f"{artefact.file} has only known operators and a bounded size")


def _run_probes(opened: Bundle, artefact: Artefact, probes: Probes, steps: _VerificationSteps) -> None:
    """Run one graph on each provider of this machine's onnxruntime."""
    if artefact.runtime != "onnx":
        steps.add("skipped", "probes", f"{artefact.file} is for TensorRT, and is checked on the serving machine")
        return
    import onnxruntime

    from resight.bundle.probes import measure_parity
    from resight.runtime.providers import open_runtime

    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda") if gpu else ("cpu",)
    for provider in providers:
        step = f"probes on {provider}"
        try:
            with steps.during(step, artefact.file):
                # The runtime rejects a graph that does not reproduce the probes; the figures are for display.
                loaded = open_runtime(opened, provider=provider, precision=artefact.precision, max_batch=VERIFY_BATCH)
                found = measure_parity(probes, loaded.embed)
        except StartupError as error:  # a problem of this machine, not of the bundle
            steps.add("skipped", step, str(error))
            continue
        parity = f"min cosine {found.min_cosine:.6f} ({artefact.min_cosine:.6f} at export)"
        steps.add("ok", step, f"{artefact.file} reproduces {len(probes.jpegs)} golden images, {parity}")


def keygen(
    key: Annotated[
        Path, typer.Argument(metavar="KEY", help="File for the private key; the public key is written to KEY.pub.")
    ],
    passphrase: Annotated[bool, typer.Option("--passphrase", help=PASSPHRASE_HELP)] = False,
    json_file: JsonOption = None,
) -> None:
    """Create a key pair for signing bundles.

    Example: `resight bundle keygen site.key --passphrase`
    """
    secret = None
    if passphrase:
        secret = os.environ.get(PASSPHRASE) or typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
    public = generate_key(key, secret)
    table = Table(
        show_header=False,
        title="keep the private key secret; give the public key to everyone who has to verify bundles",
    )
    table.add_row("private key", escaped(key))
    table.add_row("public key", escaped(public_path(key)))
    table.add_row("public key as text", public)
    Console().print(table)
    write_json(json_file, {"private_key": str(key), "public_key": str(public_path(key)), "public": public})


def sign(
    folder: BundleArgument,
    key: Annotated[Path, typer.Option(metavar="KEY", help="Private key of `resight bundle keygen`.")],
    json_file: JsonOption = None,
) -> None:
    """Sign a bundle; an existing signature is replaced. An encrypted key's passphrase is prompted for.

    Example: `resight bundle sign lobby.bundle --key site.key`
    """
    signed = sign_bundle(folder, load_key(key))
    summary: dict[str, Any] = {"bundle": str(folder), "name": signed.manifest.name, "signer": signed.manifest.signer}
    table = Table(show_header=False, title=f"signed {escaped(folder)}")
    for name in ("name", "signer"):
        table.add_row(name, escaped(summary[name]))
    Console().print(table)
    write_json(json_file, summary)


def load_key(key: Path) -> PrivateKey:
    """Read a private key; its passphrase comes from the environment or a prompt."""
    secret: str | None = os.environ.get(PASSPHRASE)
    if secret is None and key.is_file() and is_encrypted(key.read_bytes()):
        secret = typer.prompt("Passphrase", hide_input=True)
    return load_private_key(key, secret)


for command in (verify, show, diff, keygen, sign):
    bundle.command()(command)
