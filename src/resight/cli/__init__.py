"""The command line: `resight COMMAND --help` explains each command with an example."""

from resight.cli.main import app as app
from resight.cli.main import main as main
