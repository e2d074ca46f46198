"""Parts of the command line that need no service: addresses in texts, orders, who drives a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from app.cli import breakers, client
from app.cli.client import Api, order, without_userinfo
from app.cli.errors import ApiProblem, Unreachable
from app.cli.main import app
from app.cli.next_steps import url_option
from app.cli.runs import _driver


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h:1/x", "https://h:1/x"),
        ("https://u:secret@h:1/x", "https://h:1/x"),
        ("https://u:sec/ret@h", "https://h"),
        ("https://u:sec@ret@h", "https://h"),
        ("https://u:sec//ret@h", "https://h"),
        ("u:sec//ret@h", "h"),
        ("u:secret@h/x", "h/x"),
    ],
)
def test_the_userinfo_of_an_address_is_dropped(url: str, shown: str) -> None:
    assert without_userinfo(url) == shown
    assert url_option(url) == f" --url {shown}"


def test_requests_still_carry_the_password_of_the_address() -> None:
    with Api("http://u:secret@127.0.0.1:1") as api:
        assert api.url == "http://127.0.0.1:1"
        assert api._client.base_url.password == "secret"


# --- orders ---------------------------------------------------------------------------------------


Failure = Callable[[], Exception]


class Answers:
    """A service that fails orders with these, the last one for ever; it notes their keys."""

    def __init__(self, *answers: Failure) -> None:
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.keys: list[str] = []

    def post(self, _path: str, _body: Any, headers: dict[str, str]) -> Any:
        self.keys.append(headers["Idempotency-Key"])
        raise next(self._answers)()


def refused(status: int, code: str) -> Failure:
    return lambda: ApiProblem(status, {"code": code}, 0.0)


def broken() -> Exception:
    return Unreachable("It broke.")


def gone() -> Exception:
    return Unreachable("Nobody there.", refused=True, hint=client.START_IT)


UNKNOWN = refused(503, "submit_outcome_unknown")


@pytest.mark.parametrize("answers", [[UNKNOWN], [broken], [broken, gone], [UNKNOWN, broken]])
def test_an_order_that_may_have_acted_names_its_key(
    monkeypatch: pytest.MonkeyPatch, answers: Sequence[Failure]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    for given, shown in ((None, None), ("my key", "'my key'")):
        service = Answers(*answers)
        with pytest.raises((ApiProblem, Unreachable)) as failed:
            order(cast("Api", service), "/v1/runs", {}, given)
        (key,) = set(service.keys)
        assert failed.value.hint == f"Send it again with: --idempotency-key {shown or key}"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([gone], "flexrun serve"),
        ([refused(503, "draining")], "flexrun doctor"),
        ([broken, refused(409, "invalid_run_state")], "flexrun show"),
    ],
)
def test_an_order_that_did_not_act_keeps_its_own_advice(
    monkeypatch: pytest.MonkeyPatch, answers: Sequence[Failure], said: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises((ApiProblem, Unreachable)) as failed:
        order(cast("Api", Answers(*answers)), "/v1/runs", {})
    assert said in (failed.value.hint or "")


# --- what is shown --------------------------------------------------------------------------------


def test_a_parked_run_waits_for_its_time_and_not_for_a_worker() -> None:
    def said(wake_at: str | None) -> str:
        return _driver({"worker": None, "owner": None, "wake_at": wake_at})

    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    assert said(later) == f"nothing to do until {later}, then a free worker goes on"
    # One that was given back by its worker has the time 0.
    for at_once in (None, "1970-01-01T00:00:00Z"):
        assert said(at_once) == "driven by nobody for now: the next free worker takes it over"


def test_an_empty_list_of_breakers_says_that_redis_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def listed(degraded: bool) -> tuple[str, str]:
        answer = {"degraded": degraded, "breakers": []}
        monkeypatch.setattr(Api, "get", lambda *_: answer)
        done = CliRunner().invoke(app, ["breakers", "list"])
        assert done.exit_code == 0
        return done.stdout, done.stderr

    assert listed(degraded=False) == ("This process knows no breakers.\n", "")
    assert listed(degraded=True) == ("This process knows no breakers.\n", f"{breakers.OWN}\n")


def test_breakers_are_among_what_only_speaks_to_the_service() -> None:
    _, _, catalog = CliRunner().invoke(app, ["--help"]).stdout.partition(" Catalog ")
    assert {"breakers", "capabilities", "facets"} <= set(catalog.split())
