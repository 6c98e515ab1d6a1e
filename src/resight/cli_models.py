"""The commands ``resight models``: load, switch and unload a server's models, and move collections between them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from resight.cli_connect import connect
from resight.cli_json import JsonOption, write_json

if TYPE_CHECKING:
    from resight.answers import OperationInfo

models = typer.Typer(
    help="Load, switch and unload models of a running server; migrate collections.", no_args_is_help=True
)

Server = Annotated[str, typer.Option(help="HOST:PORT of the server.", envvar="RESIGHT_SERVER")]
ModelId = Annotated[str, typer.Argument(help="Name of the model.")]
Name = Annotated[str, typer.Argument(help="Name of the collection.")]

DEFAULT_SERVER = "127.0.0.1:50051"
A_DAY_S = 86_400.0


@models.command("list")
def list_models(server: Server = DEFAULT_SERVER, json_file: JsonOption = None) -> None:
    """Show all models, loaded or not. Example: `resight models list`."""
    with connect(server) as client:
        found = list(client.models())
    table = Table("model", "state", "space", "made", "runs on", "problem", title=f"{len(found)} models on {server}")
    for one in found:
        state = "active" if one.active else one.state
        table.add_row(one.model_id, state, one.space_id[:12], one.version, one.provider, one.problem)
    Console().print(table)
    write_json(json_file, [asdict(one) for one in found])


@models.command()
def load(model: ModelId, server: Server = DEFAULT_SERVER) -> None:
    """Load a model from the server's folder of models. Example: `resight models load lobby-2`.

    The one that serves goes on serving, whether this succeeds or not.
    """
    with connect(server) as client:
        done = client.wait(client.load_model(model), timeout_s=A_DAY_S)
    _tell(done, f"loaded {model}, space {done.result.get('space_id', '')[:12]}")


@models.command()
def activate(
    model: ModelId,
    expected: Annotated[str, typer.Option(help="Only if this one is active now.")] = "",
    server: Server = DEFAULT_SERVER,
) -> None:
    """Let a loaded model embed what names none. Example: `resight models activate lobby-2`."""
    with connect(server) as client:
        active, previous = client.activate_model(model, expected=expected)
    Console().print(f"{active.model_id} is active, {previous.model_id} was", highlight=False)


@models.command()
def unload(model: ModelId, server: Server = DEFAULT_SERVER) -> None:
    """Free a model's memory. Example: `resight models unload lobby-1`."""
    with connect(server) as client:
        client.unload_model(model)
    Console().print(f"unloaded {model}", highlight=False)


@models.command()
def migrate(
    collection: Name,
    to: Annotated[str, typer.Option(help="Name of the loaded model to move to.")],
    auto_activate: Annotated[
        bool, typer.Option("--auto-activate", help="Search in the new space once the gate is passed.")
    ] = False,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave entries without a stored crop behind.")
    ] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Embed a collection's stored crops with another model. Example: `resight models migrate lobby --to lobby-2`.

    It is searched in the old space meanwhile. Interrupting this command does not end the migration; the same
    command shows it again.
    """
    console = Console(stderr=True)
    with connect(server) as client, console.status(f"migrating {collection}") as status:
        begun = client.migrate(collection, to, auto_activate=auto_activate, drop_missing=drop_missing)
        done = client.wait(
            begun, timeout_s=A_DAY_S, told=lambda now: status.update(f"{now.succeeded} of {now.total} entries")
        )
    lines = [f"{name} {value}" for name, value in sorted(done.result.items())]
    _tell(done, "\n".join((f"{done.succeeded} of {done.total} entries of {collection} are in the new space", *lines)))


@models.command("activate-space")
def activate_space(
    collection: Name,
    space_id: Annotated[str, typer.Argument(help="Id of one of the collection's spaces.")],
    expected: Annotated[str, typer.Option(help="Only if it is searched in this space now.")] = "",
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Entries without a feature there are not found.")
    ] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Search a collection in another space, or in the one before. Example: `resight models activate-space lobby ID`."""
    with connect(server) as client:
        active, previous = client.activate_space(
            collection, space_id, expected=expected, allow_incomplete=allow_incomplete
        )
    Console().print(f"{collection} is searched in space {active}, was in {previous}", highlight=False, soft_wrap=True)


def _tell(done: OperationInfo, well: str) -> None:
    """Say how an operation ended; its error is the command's."""
    if done.error is not None:
        raise done.error
    if done.state != "succeeded":
        Console(stderr=True).print(f"operation {done.operation_id} was {done.state}", highlight=False)
        raise typer.Exit(1)
    Console().print(well, highlight=False, soft_wrap=True)
