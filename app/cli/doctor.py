"""`flexrun doctor`: what is configured, what is there, what is wrong and what to do about it."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.client import START_IT, Api, without_userinfo
from app.cli.config import DatabaseUrl, DataDir, database_errors, database_of, load_settings, masked
from app.cli.errors import CliError, ExitCode, Unreachable
from app.cli.output import as_json, out
from app.version import VERSION

if TYPE_CHECKING:
    from app.settings import Settings

PYTHON_MIN = (3, 11)
POSTGRES_MIN = 15
DURABILITY = ("fsync", "full_page_writes", "synchronous_commit")
MIGRATE = "flexrun migrate"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `todo` says what to do; only a problem makes the doctor unhappy."""

    name: str
    detail: str
    is_problem: bool = False
    todo: str | None = None


def doctor(
    url: Annotated[
        str | None, typer.Option(envvar="FLEXRUN_URL", help="Where the service should be.")
    ] = None,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Check this installation. Exit code 0 when nothing is wrong, else 1."""
    problems = 0
    for check in _checks(url, database_url, data_dir):
        mark = "PROBLEM" if check.is_problem else "note" if check.todo else "ok"
        out(f"{mark:<8} {check.name:<11} {check.detail}")
        if check.todo:
            out(f"{'':<8} {'':<11} → {check.todo}")
        problems += check.is_problem
    out()
    out(f"{problems} problem(s) found." if problems else "All good.")
    raise typer.Exit(ExitCode.FAILED if problems else ExitCode.OK)


def _checks(url: str | None, database_url: str | None, data_dir: Path | None) -> Iterator[Check]:
    yield _python()
    try:
        settings = load_settings(database_url=database_url, data_dir=data_dir)
    except CliError as error:
        yield Check("settings", error.message, True, error.hint or "Correct them.")
        return
    yield _settings(settings)
    yield _models(settings)
    if settings.database_url is None:
        yield from _embedded(settings)
    else:
        yield Check("database", masked(settings.database_url.get_secret_value()))
        yield from _database(settings)
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    shown = f"[{host}]" if ":" in host else host
    yield _service(url or f"http://{shown}:{settings.port}")


def _python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}, flexrun {VERSION}"
    if sys.version_info < PYTHON_MIN:
        return Check("python", detail, True, "Flexrun needs Python 3.11 or newer.")
    return Check("python", detail)


def _settings(settings: Settings) -> Check:
    """What differs from the defaults; secrets are masked by their type."""
    changed = {
        name: masked(settings.database_url.get_secret_value())
        if name == "database_url" and settings.database_url
        else getattr(settings, name)
        for name in sorted(settings.model_fields_set)
    }
    shown = ", ".join(f"{name}={value}" for name, value in changed.items())
    secrets = settings.secrets_file
    if secrets is not None and not os.access(secrets, os.R_OK):
        todo = "Correct FLEXRUN_SECRETS_FILE, or let this user read it."
        return Check("settings", f"{shown}; {secrets} can not be read", True, todo)
    return Check("settings", shown or "all at their defaults")


def _models(settings: Settings) -> Check:
    from app.llm.catalog import load_catalog  # noqa: PLC0415 - only this command needs it
    from app.llm.models_file import ModelsInvalid  # noqa: PLC0415
    from app.settings import variable  # noqa: PLC0415

    try:
        catalog = load_catalog(settings.models_file, variable, is_enabled=settings.models_enabled)
    except ModelsInvalid as error:
        return Check("models", error.detail, True, "Correct the file; its comments tell how.")
    able = [name for name, found in catalog.providers.items() if not found.unavailable]
    shown = f"of {', '.join(able)}" if able else "none: no provider is configured"
    return Check("models", shown)


# --- the database ---------------------------------------------------------------------------------


def _embedded(settings: Settings) -> Iterator[Check]:
    # Finding binaries asks each for its version; only this command does it without a start.
    from app.store.embedded_binaries import find_binaries  # noqa: PLC0415
    from app.store.embedded_files import EmbeddedPostgresError, find_home  # noqa: PLC0415
    from app.store.embedded_supervisor import CLUSTER_NAME  # noqa: PLC0415

    folder = settings.data_dir.expanduser().absolute()
    is_made = False
    try:
        is_made = folder.exists() and (find_home(folder) / CLUSTER_NAME).exists()
        binaries = find_binaries(folder / CLUSTER_NAME)
        yield Check("binaries", f"Postgres {binaries.version} in {binaries.folder}")
    except (EmbeddedPostgresError, OSError) as error:
        yield Check("binaries", str(error), True, "Or set DATABASE_URL to use another Postgres.")
        return
    data = _data_dir(folder)
    yield data
    if data.is_problem:
        return
    if is_made:
        yield from _database(settings)
    else:
        yield Check("database", "not made yet", todo="The first `flexrun serve` makes it.")


def _data_dir(folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        detail = f"{existing} can not be written to ({error.strerror})"
        return Check("data", detail, True, "Choose another folder: --data-dir or FLEXRUN_DATA_DIR.")
    return Check("data", str(folder) if existing == folder else f"{folder} (not made yet)")


def _database(settings: Settings) -> Iterator[Check]:
    from app.cli.upkeep import facts_of  # noqa: PLC0415 - heavy, see there

    try:
        with database_errors(), database_of(settings) as (dsn, _):
            facts = facts_of(dsn)
    except CliError as error:
        todo = "Is it running, and are address, user and password right?"
        yield Check(
            "postgres", error.message, True, None if settings.database_url is None else todo
        )
        return
    yield _postgres(facts)
    yield _durability(facts, settings)
    yield from _schema(facts, settings)


def _postgres(facts: dict[str, Any]) -> Check:
    version = str(facts["version"])
    major = version.split(".")[0].split()[0]
    detail = f"version {version}, up since {facts['started_at']:%Y-%m-%d %H:%M} UTC"
    if major.isdigit() and int(major) < POSTGRES_MIN:
        return Check("postgres", detail, True, f"Flexrun needs Postgres {POSTGRES_MIN} or newer.")
    return Check("postgres", detail)


def _durability(facts: dict[str, Any], settings: Settings) -> Check:
    detail = ", ".join(f"{name} {facts[name]}" for name in DURABILITY)
    if "off" not in (facts[name] for name in DURABILITY):
        return Check("durability", detail)
    if settings.allow_unsafe_postgres:
        return Check("durability", f"{detail}: accepted by FLEXRUN_ALLOW_UNSAFE_POSTGRES")
    return Check("durability", detail, True, "Turn them on: a crash could lose accepted runs.")


def _schema(facts: dict[str, Any], settings: Settings) -> Iterator[Check]:
    revision, head = facts["revision"], facts["head"]
    if facts["is_behind"]:
        detail = f"at revision {revision or 'empty'}, this version needs {head}"
        is_ours = settings.database_url is None
        yield Check("schema", detail, not is_ours, f"{MIGRATE}{' (or serve)' if is_ours else ''}")
        return
    newest = "the newest" if revision == head else f"newer than this version's {head}"
    yield Check("schema", f"at revision {revision}, {newest}")
    days = facts["days"]
    todo = None if days else "The service makes them at start and every hour."
    yield Check("partitions", f"{days} days ahead", todo=todo)


# --- the service ----------------------------------------------------------------------------------


def _service(address: str) -> Check:
    url = without_userinfo(address)
    try:
        with Api(address) as api:
            ready = api.probe("/readyz")
    except Unreachable as error:
        return Check("service", f"not running at {url}", not error.refused, START_IT)
    except CliError as error:
        return Check("service", error.message, True, error.hint)
    if ready.get("status") == "ok":
        return Check("service", f"ready at {url}")
    if ready.get("status") == "degraded":
        detail = f"ready at {url}, without Redis"
        todo = "Runs go on; breakers are each process's own. Is Redis up, and REDIS_URL right?"
        return Check("service", detail, todo=todo)
    bad = {n: check for n, check in ready.get("checks", {}).items() if not check.get("ok")}
    detail = f"at {url}, but not ready: {as_json(bad, indent=None)}"
    return Check("service", detail, True, "Its log on stderr says more.")
