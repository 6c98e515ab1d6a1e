"""`resight models`: load, activate and unload models, migrate collections, shadows, and requests for adaptation."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli.options import (
    DEFAULT_SERVER,
    CollectionName,
    JsonOption,
    ServerOption,
    connect,
    figure_cell,
    parse_duration,
    write_json,
)

if TYPE_CHECKING:
    from resight.client.responses import OperationInfo


models = typer.Typer(
    help="Load, activate and unload models of a running server; migrate collections.", no_args_is_help=True
)
ModelId = Annotated[str, typer.Argument(help="Name of the model.")]
OPERATION_TIMEOUT_S = 86_400.0


@models.command("list")
def list_models(server: ServerOption = DEFAULT_SERVER, json_file: JsonOption = None) -> None:
    """List all models, loaded or not. Example: `resight models list`."""
    with connect(server) as client:
        found = list(client.models())
    table = Table("model", "state", "space", "version", "provider", "problem", title=f"{len(found)} models on {server}")
    for one in found:
        state = "active" if one.active else one.state
        table.add_row(one.model_id, state, one.space_id[:12], one.version, one.provider, one.problem)
    Console().print(table)
    write_json(json_file, [asdict(one) for one in found])


@models.command()
def load(model: ModelId, server: ServerOption = DEFAULT_SERVER) -> None:
    """Load a model from the server's model folder. Example: `resight models load lobby-2`.

    The active model keeps serving, whether this succeeds or not.
    """
    with connect(server) as client:
        done = client.wait(client.load_model(model), timeout_s=OPERATION_TIMEOUT_S)
    _print_operation(done, f"loaded {model}, space {done.result.get('space_id', '')[:12]}")


@models.command()
def activate(
    model: ModelId,
    expected: Annotated[str, typer.Option(help="Only if this model is active now.")] = "",
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Make a loaded model the default. Example: `resight models activate lobby-2`."""
    with connect(server) as client:
        active, previous = client.activate_model(model, expected=expected)
    Console().print(f"{active.model_id} is active instead of {previous.model_id}", highlight=False)


@models.command()
def unload(model: ModelId, server: ServerOption = DEFAULT_SERVER) -> None:
    """Unload a model. Example: `resight models unload lobby-1`."""
    with connect(server) as client:
        client.unload_model(model)
    Console().print(f"unloaded {model}", highlight=False)


@models.command()
def migrate(
    collection: CollectionName,
    to: Annotated[str, typer.Option(help="Name of the loaded model to migrate to.")],
    auto_activate: Annotated[
        bool, typer.Option("--auto-activate", help="Activate the new space if the quality gate passes.")
    ] = False,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Do not migrate entries without a stored crop.")
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Embed a collection's stored crops with another model. Example: `resight models migrate lobby --to lobby-2`.

    Searches use the old space meanwhile. Interrupting this command does not stop the migration; the same command
    shows its progress again.
    """
    console = Console(stderr=True)
    with connect(server) as client, console.status(f"migrating {collection}") as status:
        begun = client.migrate(collection, to, auto_activate=auto_activate, drop_missing=drop_missing)
        done = client.wait(
            begun,
            timeout_s=OPERATION_TIMEOUT_S,
            on_update=lambda now: status.update(f"{now.succeeded} of {now.total} entries"),
        )
    lines = [f"{name} {value}" for name, value in sorted(done.result.items())]
    _print_operation(
        done, "\n".join((f"{done.succeeded} of {done.total} entries of {collection} are in the new space", *lines))
    )


@models.command("activate-space")
def activate_space(
    collection: CollectionName,
    space_id: Annotated[str, typer.Argument(help="Id of one of the collection's spaces.")],
    expected: Annotated[str, typer.Option(help="Only if this space is active now.")] = "",
    allow_incomplete: Annotated[
        bool,
        typer.Option(
            "--allow-incomplete", help="Activate it even if entries have no feature in it; searches do not find them."
        ),
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Activate another, or the previous, space of a collection. Example: `resight models activate-space lobby ID`."""
    with connect(server) as client:
        active, previous = client.activate_space(
            collection, space_id, expected=expected, allow_incomplete=allow_incomplete
        )
    Console().print(f"{collection} uses space {active} instead of {previous}", highlight=False, soft_wrap=True)


def _print_operation(done: OperationInfo, message: str) -> None:
    """Print the end of an operation; raises its error."""
    if done.error is not None:
        raise done.error
    if done.state != "succeeded":
        Console(stderr=True).print(f"operation {done.operation_id} was {done.state}", highlight=False)
        raise typer.Exit(1)
    Console().print(message, highlight=False, soft_wrap=True)


SHADOW_SIDE_FIGURES = (
    "matches",
    "uncertain",
    "unknown",
    "without_hit",
    "unknown_share",
    "mean_probability",
    "mean_cosine",
)
SHADOW_TIMES = ("infer_p50_ns", "infer_p95_ns", "search_p50_ns", "search_p95_ns", "total_p50_ns", "total_p95_ns")
SHADOW_SHARED_FIGURES = ("top1_agreement", "overlap_at_10", "decision_agreement", "cosine_shift")


def shadow(
    name: CollectionName,
    model: Annotated[
        str, typer.Argument(help="Loaded model to start a shadow with. [default: show the current shadow]")
    ] = "",
    sample: Annotated[float, typer.Option(help="Share of the searches with crops, above 0 and at most 1.")] = 1.0,
    max_searches: Annotated[int, typer.Option(help="Stop after this number of searches; 0 = no limit.")] = 0,
    ends_after: Annotated[str | None, typer.Option("--for", help="Stop after this time: 12h, 2d.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the current shadow.")] = False,
    server: ServerOption = DEFAULT_SERVER,
    json_file: JsonOption = None,
) -> None:
    """Compare a candidate with the active model on live searches. Example: `resight models shadow lobby lobby-2`.

    The collection must be migrated to the candidate, whose space must not be active. Without a model, the command shows
    the current figures; `--stop` stops the shadow.
    """
    with connect(server) as client:
        if stop:
            found = client.stop_shadow(name)
        elif model:
            lives = None if ends_after is None else parse_duration(ends_after)
            found = client.start_shadow(name, model, sample=sample, max_searches=max_searches, expire_after=lives)
        else:
            found = client.get_shadow(name)
    figures = found.figures
    counts = f"{figures.answered} of {figures.sampled} sampled, {figures.dropped} dropped, {figures.failed} failed"
    console = Console()
    heading = f"{name}: {found.model_id} compared with {found.active_model_id}, {found.state}, {counts}"
    console.print(heading, highlight=False, soft_wrap=True)
    table = Table("figure", found.active_model_id, found.model_id)
    for figure in SHADOW_SIDE_FIGURES:
        table.add_row(
            figure, figure_cell(getattr(figures.active, figure)), figure_cell(getattr(figures.candidate, figure))
        )
    for figure in SHADOW_TIMES if figures.active.measured else ():
        times = [f"{getattr(side, figure) / 1e6:.2f}" for side in (figures.active, figures.candidate)]
        table.add_row(figure.replace("_ns", "_ms"), *times)
    for figure in SHADOW_SHARED_FIGURES:
        table.add_row(figure, "", figure_cell(getattr(figures, figure)))
    console.print(table)
    write_json(json_file, asdict(found))


def request_adaptation(
    site: Annotated[str, typer.Argument(help="Name of the site, as in its site.toml.")],
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Request a run of a site's cycle. Example: `resight models adapt lobby`.

    The server does not start it: `resight cycle run` of that site polls for requests.
    """
    with connect(server) as client:
        operation = client.start_adaptation(site)
    Console().print(
        f"requested an adaptation of {site}: operation {operation.operation_id} is {operation.state}", highlight=False
    )
