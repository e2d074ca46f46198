"""The command line: `flexrun serve | run | show | tail | …`. Only names commands and prints errors.

Commands speak to the HTTP API; those of *This machine* also touch the database of
this machine. Nothing heavy is imported before a command needs it: `flexrun --help` is quick.
"""

from __future__ import annotations

import io
import platform
import sys
from typing import NoReturn

import typer

from app.cli.breakers import breakers
from app.cli.database import migrate, prune
from app.cli.demo import demo
from app.cli.doctor import doctor
from app.cli.errors import CliError
from app.cli.models import models
from app.cli.output import err, out
from app.cli.plan import plan
from app.cli.registry import capabilities, facets
from app.cli.run import run
from app.cli.runs import runs, show, tail
from app.cli.serve import api, serve, worker
from app.cli.signals import cancel, pause, resume
from app.version import VERSION

GROUPS = ("breakers", "capabilities", "facets")

app = typer.Typer(
    name="flexrun",
    help="Runs agent work as verified plans: durable, streamed, provable.",
    no_args_is_help=True,
    # Tracebacks with local values could show secrets.
    pretty_exceptions_enable=False,
)


@app.command()
def version() -> None:
    """Print the version."""
    out(f"flexrun {VERSION} (Python {platform.python_version()})")


for panel, commands in {
    "Runs": (run, show, tail, runs, cancel, pause, resume, plan),
    "This machine": (serve, api, worker, migrate, prune, doctor),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(capabilities, name="capabilities", rich_help_panel="Catalog")
app.add_typer(facets, name="facets", rich_help_panel="Catalog")
app.add_typer(breakers, name="breakers", rich_help_panel="Catalog")
app.command(rich_help_panel="Catalog")(models)
app.command(hidden=True)(demo)


def main() -> NoReturn:
    """The console script. Expected errors become a sentence on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that can not show a sign gets a question mark, not an error.
            stream.reconfigure(errors="replace")
    try:
        app(args=_with_default(sys.argv[1:]), prog_name="flexrun")
    except CliError as error:
        err(error.message)
        if error.hint:
            err(error.hint)
        sys.exit(error.exit_code)
    sys.exit(0)


def _with_default(args: list[str]) -> list[str]:
    """`flexrun facets` means `flexrun facets list`."""
    is_bare = args[:1] and args[0] in GROUPS and (len(args) == 1 or args[1].startswith("-"))
    if is_bare and not {"--help", "-h"} & set(args):
        return [args[0], "list", *args[1:]]
    return args


if __name__ == "__main__":
    main()
