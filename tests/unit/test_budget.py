"""The budget of a run: what is held and spent never goes over a limit, whatever calls do."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.budget import Account, BudgetExhausted, Spent
from app.domain.envelope import Budget

_usd = st.decimals(0, 2, places=4)
_tokens = st.integers(0, 2_000)


@given(
    limits=st.builds(
        Budget,
        usd=st.none() | _usd,
        tokens=st.none() | st.integers(0, 5_000),
        calls=st.none() | st.integers(0, 8),
    ),
    calls=st.lists(st.tuples(_tokens, _usd, st.floats(0, 1)), max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_calls_that_cost_at_most_what_was_held_stay_within_every_limit(
    limits: Budget, calls: list[tuple[int, Decimal, float]], order: random.Random
) -> None:
    account = Account(limits)
    under_way: list[tuple[Spent, float]] = []
    for tokens, usd, share in calls:
        try:
            under_way.append((account.hold(tokens, usd), share))
        except BudgetExhausted:
            continue
        if len(under_way) > 3:
            _end(account, *under_way.pop(order.randrange(len(under_way))))
        for resource in ("usd", "tokens", "calls"):
            limit = getattr(limits, resource)
            taken = getattr(account.spent, resource) + getattr(account.held, resource)
            assert limit is None or taken <= limit
    for held, share in under_way:
        _end(account, held, share)
    assert account.held == Spent()


def _end(account: Account, held: Spent, share: float) -> None:
    part = Decimal(share)
    account.settle(held, Spent(held.usd * part, int(held.tokens * share), 1))


@pytest.mark.parametrize(
    ("limits", "resource"),
    [
        (Budget(calls=2), "calls"),
        (Budget(tokens=250), "tokens"),
        (Budget(usd=Decimal("0.025")), "usd"),
    ],
)
def test_the_third_of_three_calls_at_once_does_not_fit(limits: Budget, resource: str) -> None:
    account = Account(limits)
    account.hold(100, Decimal("0.01"))
    second = account.hold(100, Decimal("0.01"))
    with pytest.raises(BudgetExhausted) as refused:
        account.hold(100, Decimal("0.01"))
    assert refused.value.resource == resource
    account.settle(second, Spent(Decimal(0), 0, 0))  # it was never made: there is room again
    account.hold(100, Decimal("0.01"))


def test_without_limits_everything_fits() -> None:
    account = Account(Budget())
    for _ in range(5):
        account.settle(account.hold(10**9, Decimal(10**6)), Spent(Decimal(1), 5, 1))
    assert account.spent == Spent(Decimal(5), 25, 5)
