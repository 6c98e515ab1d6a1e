"""The commands ``resight bundle``: verify, show, compare and sign the folders that models travel in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from resight.bundle import Bundle, open_bundle, sign_bundle
from resight.cli_bundle_show import diff, megabytes, missing_packages, plain, show
from resight.cli_json import JsonOption, write_json
from resight.errors import BundleError, StartupError
from resight.signature import PrivateKey, load_public_keys
from resight.signing_key import generate_key, is_encrypted, load_private_key, public_path

if TYPE_CHECKING:
    from resight.manifest import Artefact
    from resight.probes import Probes

bundle = typer.Typer(help="Verify, show, compare and sign bundles.", no_args_is_help=True)

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder that `resight export` made.")]
KEYS_HELP = "Public key, or the .pub file with it, that must have signed; may be repeated."
RUNTIME_HELP = "Run the probes through the graphs. [default: where onnxruntime is installed]"
PASSPHRASE = "RESIGHT_KEY_PASSPHRASE"
PASSPHRASE_HELP = f"Encrypt the private key; the passphrase is asked for, or read from {PASSPHRASE}."
COLOURS = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
BATCH = 7  # the larger of the probes' batch sizes


class _Steps:
    """What was checked, in order, and what came of it; what passed is told even when a later check fails."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def add(self, result: str, step: str, found: str) -> None:
        self.rows.append({"step": step, "result": result, "found": found})

    @contextmanager
    def during(self, step: str, file: str = "") -> Iterator[None]:
        """A refusal inside fails the step and names the file."""
        try:
            yield
        except BundleError as error:
            named = error if file in str(error) else BundleError(f"{file}: {error}")
            self.add("failed", step, str(named))
            raise named from error

    def table(self, title: str) -> Table:
        table = Table("step", "result", "found", title=title)
        for row in self.rows:
            colour = COLOURS[row["result"]]
            table.add_row(plain(row["step"]), f"[{colour}]{row['result']}[/{colour}]", plain(row["found"]))
        return table


def verify(
    folder: BundleArgument,
    key: Annotated[list[str] | None, typer.Option(metavar="PUB", help=KEYS_HELP)] = None,
    runtime: Annotated[bool | None, typer.Option("--runtime/--no-runtime", help=RUNTIME_HELP)] = None,
    json_file: JsonOption = None,
) -> None:
    """Check every byte, the signature, the graphs, and that they reproduce their golden features here.

    Example: `resight bundle verify lobby.bundle --key site.key.pub`
    """
    keys = load_public_keys(key or ())
    steps, verified = _Steps(), False
    try:
        _verify(folder, keys, runtime, steps)
        verified = True
    finally:
        Console().print(steps.table(f"{plain(folder)} is {'verified' if verified else 'refused'}"))
        write_json(json_file, {"bundle": str(folder), "verified": verified, "keys": keys, "steps": steps.rows})


def _verify(folder: Path, keys: tuple[str, ...], runtime: bool | None, steps: _Steps) -> None:
    with steps.during("files and signature"):
        opened = open_bundle(folder, trusted_keys=keys)
    manifest = opened.manifest
    sizes = [path.stat().st_size for path in folder.iterdir()]
    steps.add("ok", "files", f"{len(sizes)} files, {megabytes(sum(sizes))}, none altered, missing or added")
    if manifest.signer:
        trust = "a key you trust" if keys else "a key nobody vouched for: name those you trust with --key"
        steps.add("ok", "signature", f"by {manifest.signer}, {trust}")
    else:
        steps.add("skipped", "signature", "none: whoever can write the folder can make it anew")
    lacking = missing_packages()
    if runtime and lacking:
        raise StartupError(f"--runtime needs {lacking}, found none: `pip install 'resight[cpu]'`, or leave it out")
    if lacking:
        steps.add("skipped", "graph", f"nothing read: {lacking} is not installed")
    else:
        _check_graphs(opened, steps)
    with steps.during("probes", manifest.probes.file):
        probes = opened.probes()
    if lacking or runtime is False:
        why = f"{lacking} is not installed: `pip install 'resight[cpu]'`" if lacking else "--no-runtime"
        steps.add("skipped", "probes", f"{len(probes.jpegs)} golden images read, none run: {why}")
        return
    for artefact in manifest.artefacts:
        _run_probes(opened, artefact, probes, steps)


def _check_graphs(opened: Bundle, steps: _Steps) -> None:
    """Read every graph as a runtime would before it loads it."""
    from resight.graph_check import check_graph

    manifest = opened.manifest
    for artefact in manifest.artefacts:
        with steps.during("graph", artefact.file):
            check_graph(opened.read(artefact.precision, artefact.runtime), manifest.image, manifest.feature_dim)
        steps.add("ok", "graph", f"{artefact.file} holds known operators only, of bounded size")


def _run_probes(opened: Bundle, artefact: Artefact, probes: Probes, steps: _Steps) -> None:
    """One form of the model on each provider of this machine's onnxruntime."""
    if artefact.runtime != "onnx":
        steps.add("skipped", "probes", f"{artefact.file} is for TensorRT, which proves it where it serves")
        return
    import onnxruntime

    from resight.probes import measure_parity
    from resight.service.runtime import open_runtime

    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    providers: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda") if gpu else ("cpu",)
    for provider in providers:
        step = f"probes on {provider}"
        try:
            with steps.during(step, artefact.file):
                # The runtime refuses what does not reproduce the probes; the figures are measured for the reader.
                loaded = open_runtime(opened, provider=provider, precision=artefact.precision, max_batch=BATCH)
                found = measure_parity(probes, loaded.embed)
        except StartupError as error:  # this machine's fault, not the bundle's
            steps.add("skipped", step, str(error))
            continue
        told = f"min cosine {found.min_cosine:.6f} ({artefact.min_cosine:.6f} at export)"
        steps.add("ok", step, f"{artefact.file} reproduces {len(probes.jpegs)} golden images, {told}")


def keygen(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="File of the private key to be; KEY.pub is made too.")],
    passphrase: Annotated[bool, typer.Option("--passphrase", help=PASSPHRASE_HELP)] = False,
    json_file: JsonOption = None,
) -> None:
    """Make a key pair that signs bundles.

    Example: `resight bundle keygen site.key --passphrase`
    """
    secret = None
    if passphrase:
        secret = os.environ.get(PASSPHRASE) or typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
    public = generate_key(key, secret)
    table = Table(show_header=False, title="keep the private key secret; give the public key to whoever must trust it")
    table.add_row("private key", plain(key))
    table.add_row("public key", plain(public_path(key)))
    table.add_row("the same as a line", public)
    Console().print(table)
    write_json(json_file, {"private_key": str(key), "public_key": str(public_path(key)), "public": public})


def sign(
    folder: BundleArgument,
    key: Annotated[Path, typer.Option(metavar="KEY", help="Private key of `resight bundle keygen`.")],
    json_file: JsonOption = None,
) -> None:
    """Sign a bundle; a signature already there gives way. The passphrase is asked for where the key has one.

    Example: `resight bundle sign lobby.bundle --key site.key`
    """
    signed = sign_bundle(folder, load_key(key))
    told: dict[str, Any] = {"bundle": str(folder), "name": signed.manifest.name, "signer": signed.manifest.signer}
    table = Table(show_header=False, title=f"signed {plain(folder)}")
    for name in ("name", "signer"):
        table.add_row(name, plain(told[name]))
    Console().print(table)
    write_json(json_file, told)


def load_key(key: Path) -> PrivateKey:
    """Read a private key; its passphrase comes from the environment or is asked for."""
    secret: str | None = os.environ.get(PASSPHRASE)
    if secret is None and key.is_file() and is_encrypted(key.read_bytes()):
        secret = typer.prompt("Passphrase", hide_input=True)
    return load_private_key(key, secret)


for command in (verify, show, diff, keygen, sign):
    bundle.command()(command)
