"""`.env.example` says what the settings say: every name, its meaning and its default.

After a change of the settings `make fix` writes the file anew: run as a program, this prints it.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from app.settings import Settings

FILE = Path(__file__).parents[2] / ".env.example"

HEADER = """\
# Every setting of Flexrun with its default. To change some: copy this file to .env, remove the "#"
# in front of their names, and start with `set -a; . ./.env; set +a; make run`.
"""


def variable(name: str, field: FieldInfo) -> str:
    """The environment variable of a field: its own name where it has one, else with our prefix."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        alias = alias.choices[0]
    if alias is None:
        return f"{Settings.model_config['env_prefix']}{name}".upper()
    assert isinstance(alias, str), f"{name} is read from something else than a variable"
    return alias


def written(default: Any) -> str:
    """A default as one writes it into the environment."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default)


def expected() -> str:
    """The file as it should be."""
    text = HEADER
    for name, field in Settings.model_fields.items():
        assert field.description, f"{name} does not say what it means"
        assert not field.is_required(), f"{name} has no default: `make demo` would not start"
        text += f"\n# {field.description}\n#{variable(name, field)}={written(field.default)}\n"
    return text


def lines_of_settings() -> list[tuple[str, str]]:
    """Every name with its value, from the file itself."""
    pairs = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.removeprefix("#").partition("=")
        if equals and name.isupper() and " " not in name:
            pairs.append((name, value))
    return pairs


def test_the_example_lists_every_setting_with_its_meaning_and_default() -> None:
    assert FILE.read_text(encoding="utf-8") == expected()


def test_a_setting_is_listed_once() -> None:
    names = [name for name, _ in lines_of_settings()]
    assert len(names) == len(set(names)) == len(Settings.model_fields)


def test_the_example_without_its_comment_signs_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, _ in lines_of_settings():
        monkeypatch.delenv(name, raising=False)
    plain = Settings()
    for name, value in lines_of_settings():
        if value:
            monkeypatch.setenv(name, value)
    assert Settings() == plain


if __name__ == "__main__":
    sys.stdout.write(expected())
