"""`flexrun serve`, `api` and `worker`: the processes of the service, over one Postgres."""

from __future__ import annotations

import errno
import gc
import importlib
import ipaddress
import signal
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.config import DatabaseUrl, DataDir, database_errors, database_of, load_settings
from app.cli.errors import PORT_IN_USE, CliError, ExitCode, UsageError

if TYPE_CHECKING:
    from app.settings import Role, Settings

PORT_MAX = 65_535

Host = Annotated[str | None, typer.Option(help="Address to listen on. [FLEXRUN_HOST, 127.0.0.1]")]
LogLevel = Annotated[
    str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR. [FLEXRUN_LOG_LEVEL, INFO]")
]


def _port(default: str) -> Any:
    return typer.Option("--port", min=0, max=PORT_MAX, help=f"0 takes a free one. [{default}]")


def serve(
    host: Host = None,
    port: Annotated[int | None, _port("FLEXRUN_PORT, 8000")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    log_level: LogLevel = None,
) -> None:
    """Run the service: API and worker in one. Without DATABASE_URL it starts its own Postgres.

    Exit code: 0 stopped in order, 2 refused, 3 the database is not ready, 4 the port is taken.
    """
    given = {"data_dir": data_dir, "database_url": database_url, "log_level": log_level}
    _serve("serve", host=host, port=port, **given)


def api(
    host: Host = None,
    port: Annotated[int | None, _port("FLEXRUN_PORT, 8000")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    log_level: LogLevel = None,
) -> None:
    """Run the API alone: it accepts runs and streams them, and workers drive them.

    Exit codes as of `serve`.
    """
    given = {"data_dir": data_dir, "database_url": database_url, "log_level": log_level}
    _serve("api", host=host, port=port, **given)


def worker(
    host: Host = None,
    port: Annotated[int | None, _port("FLEXRUN_WORKER_PORT, 8001")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    log_level: LogLevel = None,
) -> None:
    """Run a worker alone: it claims and drives runs. Its port answers probes and /metrics.

    Exit codes as of `serve`.
    """
    given = {"data_dir": data_dir, "database_url": database_url, "log_level": log_level}
    _serve("worker", host=host, worker_port=port, **given)


def _serve(role: Role, **given: Any) -> None:
    way_out = WayOut()
    signal.signal(signal.SIGTERM, way_out)
    signal.signal(signal.SIGINT, way_out)
    # Nothing that a start makes becomes garbage; looking for it would take a sixth of the start.
    gc.disable()
    settings = load_settings(**given)
    _configure_log(settings)
    port = settings.worker_port if role == "worker" else settings.port
    listeners = _listen(settings, role, port)
    with database_errors():
        if settings.database_url is None:
            importlib.import_module("app.store.embedded")
        # The app takes a second to import, the database about as long to start: side by side. Two
        # threads must never import the same packages at once, or they see each other's halves.
        importing = threading.Thread(target=importlib.import_module, args=("app.cli.service",))
        importing.start()
        with database_of(settings) as database:
            importing.join()
            from app.cli.service import run_service  # noqa: PLC0415 - heavy: the whole app

            if settings.database_url is None:
                from app.cli.upkeep import migrate_database  # noqa: PLC0415 - heavy, see there

                migrate_database(database.dsn)
            run_service(settings, database, role, listeners, way_out.end)


def _configure_log(settings: Settings) -> None:
    from app.kit.log import configure  # noqa: PLC0415 - not needed by other commands

    try:
        configure(settings.log_level.upper())
    except ValueError:
        raise UsageError(f"FLEXRUN_LOG_LEVEL: {settings.log_level!r} is no log level.") from None


class WayOut:
    """What a signal means while uvicorn does not have it.

    Before: leave at once, and stop on the way out what was started. After: nothing, since uvicorn
    hands on the signals that it has heeded already.
    """

    _is_over = False

    def end(self) -> None:
        """uvicorn has taken the signals."""
        self._is_over = True

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if not self._is_over:
            raise SystemExit(ExitCode.OK)


# --- the socket -----------------------------------------------------------------------------------


def _listen(settings: Settings, role: Role, port: int) -> list[socket.socket]:
    """Bind first: a port that is taken, or an address that is not allowed, costs no start."""
    try:
        found = socket.getaddrinfo(
            settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise UsageError(f"{settings.host!r} is no address here: {error.strerror}.") from None
    addresses = sorted({(family, where[0]) for family, _, _, _, where in found})
    if not settings.allow_unauthenticated:
        _refuse_public(settings.host, [str(address) for _, address in addresses])
    listeners: list[socket.socket] = []
    for family, address in addresses:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            listener.close()
            if listeners and error.errno == errno.EADDRNOTAVAIL:
                continue  # "localhost" may name an IPv6 address on a machine that has none
            raise _can_not_bind(role, settings.host, port, error) from None
        port = listener.getsockname()[1]
        listeners.append(listener)
    return listeners


def _refuse_public(host: str, addresses: list[str]) -> None:
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return
    raise UsageError(
        f"{host} can be reached from other machines, and Flexrun has no authentication yet.",
        hint="Listen on 127.0.0.1, or set FLEXRUN_ALLOW_UNAUTHENTICATED=true if something in "
        "front of it decides who may call.",
    )


def _can_not_bind(role: Role, host: str, port: int, error: OSError) -> CliError:
    if error.errno == errno.EADDRINUSE:
        another = port + 1 if port < PORT_MAX else port - 1
        return CliError(
            f"Port {port} on {host} is in use, perhaps by another flexrun.",
            exit_code=PORT_IN_USE,
            hint=f"Stop that one, or choose another port: flexrun {role} --port {another} "
            "(--port 0 takes a free one)",
        )
    return UsageError(f"{host}:{port} can not be listened on: {error.strerror}.")
