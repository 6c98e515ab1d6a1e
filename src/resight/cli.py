"""The command line: `resight COMMAND --help` explains each command with an example."""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from resight.cli_bundle import bundle
from resight.cli_collect import collect
from resight.cli_connect import access
from resight.cli_cycle import cycle
from resight.cli_cycle_demo import cycle_demo
from resight.cli_demo import demo
from resight.cli_doctor import doctor
from resight.cli_evaluate import evaluate
from resight.cli_export import export
from resight.cli_figures import figures, shadow
from resight.cli_gallery import gallery
from resight.cli_ingest import ingest
from resight.cli_judge import judge
from resight.cli_lessons import ask_to_adapt, confirm, feedback, reject
from resight.cli_models import models
from resight.cli_search import search, verify
from resight.cli_serve import serve
from resight.cli_snapshot import snapshot
from resight.cli_token import token
from resight.cli_train import adapt, builtin_weights
from resight.errors import ReIDError
from resight.machine import limit_threads

app = typer.Typer(
    help="Person re-identification that adapts itself to a site, without labels, and serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.callback(help=app.info.help)(access)
for command in (demo, ingest, collect, adapt, evaluate, judge, export, serve, search, verify, doctor):
    app.command()(command)
app.command(hidden=True)(builtin_weights)
for under_gallery in (confirm, reject, feedback, figures):
    gallery.command()(under_gallery)
models.command("adapt")(ask_to_adapt)
models.command()(shadow)
cycle.command("demo")(cycle_demo)
app.add_typer(gallery, name="gallery")
app.add_typer(snapshot, name="snapshot")
app.add_typer(models, name="models")
app.add_typer(token, name="token")
app.add_typer(bundle, name="bundle")
app.add_typer(cycle, name="cycle")


def main() -> None:
    """Run a command; errors a user can mend end with one sentence and exit status 1."""
    limit_threads()
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False, markup=False)]
    )
    try:
        app()
    except (ReIDError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
