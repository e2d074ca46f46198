"""`flexrun demo`: the whole road once. A service, an envelope over a real document, its events as
they come, and the brief; then everything is stopped again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from app.cli.client import Api, order, path_of
from app.cli.errors import CliError
from app.cli.follow import Follower
from app.cli.inputs import make_envelope
from app.cli.output import out
from app.cli.render import event_line
from app.cli.watch import EXIT_OF_STATUS, print_result

READY = "Flexrun is ready at "
READY_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
LOG_NAME = "demo.log"
LOG_LINES_SHOWN = 12
# The demo is about this machine alone, whatever the terminal is set up for.
FOREIGN = ("DATABASE_URL", "FLEXRUN_HOST", "FLEXRUN_PORT", "FLEXRUN_DATA_DIR", "FLEXRUN_FAILPOINT")


def demo(
    document: Annotated[Path, typer.Argument(help="A Markdown or text file.")] = Path("README.md"),
    data_dir: Annotated[
        Path, typer.Option(help="Where the demo's Postgres keeps its data.")
    ] = Path(".flexrun/demo"),
) -> None:
    """Start a service, brief a document, show everything, stop."""
    if not document.is_file():
        raise CliError(f"There is no file {document}.", hint="flexrun demo PATH/TO/DOCUMENT.md")
    # As Ctrl-C does: the service is stopped on the way out, and not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out("Starting the service with an embedded Postgres …")
    with _service(data_dir) as (url, ready_line), Api(url) as api:
        out(ready_line)
        out()
        out(f"POST /v1/runs: a brief of {document}")
        envelope = make_envelope(
            api, None, [f"document=@{document}"], ["brief"], f"Brief the team on {document.name}."
        )
        envelope["metadata"] = {"label": "demo"}
        run_id = order(api, path_of("runs"), envelope)["run_id"]
        for event in Follower(api, run_id):
            out(event_line(event))
        run = api.get(f"/v1/runs/{run_id}")
        print_result(run, url)
    out()
    out(f"The service is stopped. Its data stay in {data_dir}; go on with:")
    out(f"  {command()} serve --data-dir {data_dir}")
    raise typer.Exit(EXIT_OF_STATUS[run["status"]])


@contextmanager
def _service(data_dir: Path) -> Iterator[tuple[str, str]]:
    """A service of its own on a free port: its URL, and the line with which it said so."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = data_dir / LOG_NAME
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "app.cli.main", "serve"),
                *("--host", "127.0.0.1", "--port", "0", "--data-dir", str(data_dir)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            text=True,
        )
    # Without a deadline, a start that hangs would hang the demo.
    alarm = threading.Timer(READY_DEADLINE_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline().rstrip("\n")
        alarm.cancel()
        if not line.startswith(READY):
            process.wait()
            raise CliError(f"The service did not start. The end of {log_path}:\n{_end(log_path)}")
        yield line.removeprefix(READY).split(" ")[0], line
    finally:
        alarm.cancel()
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _environment() -> dict[str, str]:
    """Ours, so that the child finds the same program wherever we were called."""
    found = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    root = str(Path(__file__).resolve().parents[2])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, found.get("PYTHONPATH"))))
    return found


def _end(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES_SHOWN:]) or "(empty)"


def command() -> str:
    """How to call us from here: the demo runs before anything is on the PATH."""
    script = Path(sys.executable).with_name("flexrun")
    return os.path.relpath(script) if script.exists() else f"{sys.executable} -m app.cli.main"
