"""`flexrun models` as a process of its own, against providers on loopback of which one is down."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cli import Cli
from tests.model_server import ModelServer, running_model_server, say_nothing
from tests.servers import free_port

CANARY = "canary-55e1"


def entry(provider: str, **given: Any) -> dict[str, Any]:
    return {
        "provider": provider,
        "ctx_window": 8_192,
        "output_tokens_max": 2_000,
        "json_mode": True,
        "function_calling": True,
        "cost_tier": "free",
        "roles": ["chat"],
        **given,
    }


def write(folder: Path, openai: str, ollama: str) -> None:
    """A `models.yaml` with a provider at each of both addresses, and one without its key."""
    content = {
        "providers": {
            "hosted": {"kind": "openai", "base_url": f"{openai}/v1", "key_env": "HOSTED_KEY"},
            "local": {"kind": "ollama", "base_url_env": "LOCAL_URL"},
            "later": {"kind": "anthropic", "base_url": openai, "key_env": "LATER_KEY"},
        },
        "models": {
            "quick": entry("hosted", model="small-1"),
            "gone": entry("hosted", model="withdrawn"),
            "own": entry("local"),
        },
    }
    (folder / "models.yaml").write_text(yaml.safe_dump(content))


async def run(
    folder: Path, server: ModelServer, local_url: str, *args: str
) -> subprocess.CompletedProcess[str]:
    """The command in a folder, without blocking the server that it asks."""
    write(folder, server.url, local_url)
    cli = Cli(folder, HOSTED_KEY=CANARY, LOCAL_URL=local_url, LATER_KEY="")
    return await asyncio.to_thread(cli, "models", *args)


async def test_all_answer(tmp_path: Path) -> None:
    async with running_model_server() as hosted, running_model_server() as local:
        local.models = ["own"]
        done = await run(tmp_path, hosted, local.url)

    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["provider", "model", "in", "the", "catalog"]
    assert rows[1:] == [
        ["hosted", "large-1"],
        ["hosted", "small-1", "quick"],
        ["local", "own", "own"],
    ]
    assert "hosted does not list gone" in done.stderr
    assert "later is not configured: LATER_KEY is not set" in done.stderr
    assert [exchange.headers["authorization"] for exchange in hosted.requests] == [
        f"Bearer {CANARY}"
    ]
    assert CANARY not in done.stdout + done.stderr


async def test_one_is_down_and_the_other_is_listed(tmp_path: Path) -> None:
    async with running_model_server() as hosted:
        done = await run(tmp_path, hosted, f"http://127.0.0.1:{free_port()}")

    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["hosted", "large-1"],
        ["hosted", "small-1"],
    ]
    assert "failed: local: no connection could be made" in done.stderr
    assert "Traceback" not in done.stderr


async def test_programs_get_the_same_as_json(tmp_path: Path) -> None:
    async with running_model_server() as hosted:
        done = await run(tmp_path, hosted, f"http://127.0.0.1:{free_port()}", "--json")

    assert done.returncode == 1
    hosted_found, later, local = json.loads(done.stdout)
    assert hosted_found == {
        "provider": "hosted",
        "kind": "openai",
        "status": "answered",
        "detail": None,
        "models": [
            {"name": "large-1", "catalog": []},
            {"name": "small-1", "catalog": ["quick"]},
        ],
        "unlisted": ["gone"],
    }
    assert (later["status"], later["detail"]) == ("not_configured", "LATER_KEY is not set")
    assert (local["status"], local["models"]) == ("failed", [])
    assert local["detail"] == "local: no connection could be made"


async def test_one_that_does_not_answer_in_time_is_not_waited_for(tmp_path: Path) -> None:
    async with running_model_server() as hosted, running_model_server() as local:
        local.behave(say_nothing)
        done = await run(tmp_path, hosted, local.url, "--timeout", "2")

    assert done.returncode == 1
    assert "failed: local gave no whole answer in time" in done.stderr
    assert "hosted" in done.stdout


@pytest.mark.parametrize(
    ("command", "code"), [(("models",), 2), (("serve", "--port", "0"), 3), (("doctor",), 1)]
)
def test_a_wrong_file_is_refused_with_the_name_of_the_model(
    tmp_path: Path, command: tuple[str, ...], code: int
) -> None:
    write(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:1")
    path = tmp_path / "models.yaml"
    path.write_text(path.read_text().replace("json_mode: true", "json_mode: maybe", 1))

    done = Cli(tmp_path, DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")(*command)

    assert done.returncode == code, done.stderr
    assert "model gone, json_mode: Input should be a valid boolean" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_provider_it_says_so(tmp_path: Path) -> None:
    done = Cli(tmp_path)("models")
    assert (done.returncode, done.stderr) == (0, "")
    assert "No provider is configured" in done.stdout
