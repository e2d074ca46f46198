"""Settings for commands that stand on this machine: flags over the environment, said in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import typer

from app.cli.errors import CliError, ExitCode, UsageError

if TYPE_CHECKING:
    from app.settings import Settings

SCHEMES = ("postgresql", "postgres", "postgresql+asyncpg")
REDIS_SCHEMES = ("redis", "rediss", "unix")
PASSWORD_HINT = "Characters such as @ : / # in the password are written as %40 %3A %2F %23."

DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the embedded Postgres. [FLEXRUN_DATA_DIR, .flexrun]"),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="A Postgres to use instead of the embedded one. [DATABASE_URL, which hides the "
        "password from the process list]",
    ),
]


def load_settings(**given: Any) -> Settings:
    """The settings of the environment, with the flags that were given laid over them."""
    # pydantic is slow to import, and only commands on this machine need settings.
    from pydantic import ValidationError  # noqa: PLC0415

    from app.settings import Settings  # noqa: PLC0415

    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        # Never the text of the error: it holds what was given, which may be a secret.
        wrong = [f"  {_variable(str(found['loc'][0]))}: {found['msg']}" for found in error.errors()]
        raise UsageError("The settings are not valid:\n" + "\n".join(wrong)) from None
    url = settings.database_url
    if url is not None and _parts(url.get_secret_value()) is None:
        raise UsageError(
            "DATABASE_URL is no address of a Postgres.",
            hint=f"It looks like postgresql://user:password@host:5432/name. {PASSWORD_HINT}",
        )
    redis_url = settings.redis_url
    if redis_url is not None and _parts(redis_url.get_secret_value(), REDIS_SCHEMES) is None:
        raise UsageError(
            "REDIS_URL is no address of a Redis.",
            hint=f"It looks like redis://user:password@host:6379/0. {PASSWORD_HINT}",
        )
    return settings


def _variable(name: str) -> str:
    from app.settings import Settings  # noqa: PLC0415 - see above

    field = Settings.model_fields.get(name.lower())
    has_own_name = field is None or field.validation_alias is not None
    return name.upper() if has_own_name else f"FLEXRUN_{name.upper()}"


def masked(url: str) -> str:
    """A database address without its secrets, made only of the parts that hold none."""
    parts = _parts(url)
    if parts is None:
        return "(no valid address)"
    user = f"{parts.username}:***@" if parts.username else ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{user}{parts.hostname or ''}{port}{parts.path}"


def _parts(url: str, schemes: Collection[str] = SCHEMES) -> SplitResult | None:
    """The parts of an address; None when it is none, or hides a password elsewhere."""
    try:
        parts = urlsplit(url)
        # Reading the port is what checks it. A password with a bare "/" or "#" ends up behind it.
        is_whole = (parts.port or 0) >= 0 and "@" not in parts.path + parts.query + parts.fragment
    except ValueError:
        return None
    return parts if is_whole and parts.scheme in schemes else None


@contextmanager
def database_errors() -> Iterator[None]:
    """Errors of the database and of its start, as sentences with what to do next."""
    from app.domain.errors import FlexrunError  # noqa: PLC0415
    from app.store.embedded_files import EmbeddedPostgresError  # noqa: PLC0415

    try:
        yield
    except FlexrunError as error:
        raise CliError(
            f"{error.code}: {error.detail}",
            exit_code=ExitCode.UNREACHABLE,
            hint="What is wrong says: flexrun doctor",
        ) from None
    except EmbeddedPostgresError as error:
        raise CliError(f"The embedded Postgres: {error}", exit_code=ExitCode.UNREACHABLE) from None


class DatabaseInUse(NamedTuple):
    """The address of the database, and whether it is an embedded one that nobody else uses."""

    dsn: str
    sole_user: bool


@contextmanager
def database_of(settings: Settings) -> Iterator[DatabaseInUse]:
    """The database in use; the embedded one runs at least as long as the block."""
    if settings.database_url is not None:
        yield DatabaseInUse(settings.database_url.get_secret_value(), sole_user=False)
        return
    from app.store.embedded import EmbeddedPostgres  # noqa: PLC0415 - see above

    with EmbeddedPostgres.start(settings.data_dir) as server:
        yield DatabaseInUse(server.dsn, sole_user=server.launched)
