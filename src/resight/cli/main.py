"""The command line: `resight COMMAND --help` explains each command with an example."""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from resight.cli.adapt import adapt, builtin_weights
from resight.cli.bundle import bundle
from resight.cli.cycle import cycle
from resight.cli.demo import cycle_demo, demo
from resight.cli.evaluate import evaluate, judge
from resight.cli.export import export
from resight.cli.gallery import confirm, feedback, gallery, reject, statistics
from resight.cli.ingest import collect, ingest
from resight.cli.models import models, request_adaptation, shadow
from resight.cli.options import access
from resight.cli.search import search, verify
from resight.cli.server import doctor, serve, snapshot, token
from resight.errors import ReIDError
from resight.machine import limit_threads

app = typer.Typer(
    help="Person re-identification: adapt a model to a site without labels, and serve it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.callback(help=app.info.help)(access)
for command in (demo, ingest, collect, adapt, evaluate, judge, export, serve, search, verify, doctor):
    app.command()(command)
app.command(hidden=True)(builtin_weights)
for gallery_command in (confirm, reject, feedback, statistics):
    gallery.command()(gallery_command)
FIGURES_HELP = "Deprecated name of `resight gallery statistics`. Example: `resight gallery figures lobby --last 24h`."
gallery.command("figures", help=FIGURES_HELP, deprecated=True)(statistics)
models.command("adapt")(request_adaptation)
models.command()(shadow)
cycle.command("demo")(cycle_demo)
app.add_typer(gallery, name="gallery")
app.add_typer(snapshot, name="snapshot")
app.add_typer(models, name="models")
app.add_typer(token, name="token")
app.add_typer(bundle, name="bundle")
app.add_typer(cycle, name="cycle")


def main() -> None:
    """Run a command; errors that a user can fix are printed as one sentence, with exit status 1."""
    limit_threads()
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False, markup=False)]
    )
    try:
        app()
    except (ReIDError, OSError) as error:  # OSError: a full disk, missing write permission
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
