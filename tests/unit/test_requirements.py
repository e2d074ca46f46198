"""The requirement files name what the code imports, and the locks hold nothing but hashed pins."""

import ast
import functools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
RUNTIME, DEV = "requirements", "requirements-dev"

PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^ ;]+)(?: ; [^\\]+)?( \\)?")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def normal(name: str) -> str:
    """A distribution's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(stem: str) -> set[str]:
    """The names in an `.in` file, without those it takes over from another one."""
    lines = (ROOT / f"{stem}.in").read_text("utf-8").splitlines()
    names = [re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in lines]
    return {normal(name.group()) for name in names if name}


def locked(stem: str) -> dict[str, tuple[str, int]]:
    """Every package of a lock with its version and how many hashes it may have."""
    found: dict[str, tuple[str, int]] = {}
    name = ""
    for line in (ROOT / f"{stem}.txt").read_text("utf-8").splitlines():
        if pin := PIN.fullmatch(line):
            name = pin["name"]
            assert name not in found, f"{name} is locked twice"
            found[name] = (pin["version"], 0)
        else:
            # No address of an index, no path, no option: where packages come from is not ours.
            assert HASH.fullmatch(line), f"neither a pin nor a hash: {line}"
            found[name] = (found[name][0], found[name][1] + 1)
    return found


def imported(*folders: str) -> set[str]:
    """The distributions whose modules the code in these folders imports."""
    modules: set[str] = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    return {owner_of(module) for module in modules - OURS - sys.stdlib_module_names}


# Reads what every installed distribution holds: once is enough.
distributions = functools.cache(packages_distributions)


def owner_of(module: str) -> str:
    """The distribution of a module; of those that share a namespace one that is asked for."""
    owners = [normal(name) for name in distributions().get(module, [module])]
    asked = asked_for(RUNTIME) | asked_for(DEV)
    return next((name for name in owners if name in asked), owners[0])


def test_the_service_asks_for_all_that_it_imports() -> None:
    assert imported("app", "migrations") - asked_for(RUNTIME) == set()


def test_the_tests_ask_for_all_that_they_import() -> None:
    assert imported("tests", "bench") - asked_for(RUNTIME) - asked_for(DEV) == set()


@pytest.mark.parametrize("stem", [RUNTIME, DEV])
def test_a_lock_has_hashes_for_every_package_and_nothing_else(stem: str) -> None:
    packages = locked(stem)
    assert asked_for(stem) - set(packages) == set()
    assert [name for name, (_, hashes) in packages.items() if not hashes] == []


def test_tests_run_on_the_pins_of_the_service() -> None:
    runtime, dev = locked(RUNTIME), locked(DEV)
    assert {name: dev.get(name) for name in runtime} == runtime


@pytest.mark.parametrize("stem", [RUNTIME, DEV])
def test_what_is_asked_for_comes_from_no_place_of_its_own(stem: str) -> None:
    text = (ROOT / f"{stem}.in").read_text("utf-8")
    assert not re.search(r"://| @ |--(?!hash)[a-z]", text)
