"""The budget of one run: what it may spend on models, has spent, and holds for calls under way.

A call is made only when the most that it can cost fits beside what is spent and held, so that
nodes that run side by side can not go over a limit together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal

from app.domain.envelope import Budget


@dataclass(slots=True)
class Spent:
    """What calls of models have cost. `usd` is a decimal."""

    usd: Decimal = Decimal(0)
    tokens: int = 0
    calls: int = 0

    def add(self, other: Spent) -> None:
        self.usd += other.usd
        self.tokens += other.tokens
        self.calls += other.calls

    def take_back(self, other: Spent) -> None:
        self.usd -= other.usd
        self.tokens -= other.tokens
        self.calls -= other.calls


class BudgetExhausted(Exception):
    """The call would not fit. `spent` includes what is held for calls under way."""

    def __init__(self, resource: str, limit: Decimal | int, spent: Decimal | int) -> None:
        super().__init__(f"The budget of {limit} {resource} does not allow another call.")
        self.resource = resource
        self.limit = limit
        self.spent = spent


@dataclass(slots=True)
class Account:
    """The limits of a run and what became of them. Shared by all its nodes, in one process."""

    limits: Budget
    spent: Spent = field(default_factory=Spent)
    held: Spent = field(default_factory=Spent)

    def hold(self, tokens: int, usd: Decimal) -> Spent:
        """Set aside the most that a call can cost, until `settle`. Raises `BudgetExhausted`."""
        call = Spent(usd, tokens, 1)
        for resource in ("usd", "tokens", "calls"):
            limit = getattr(self.limits, resource)
            taken = getattr(self.spent, resource) + getattr(self.held, resource)
            if limit is not None and taken + getattr(call, resource) > limit:
                raise BudgetExhausted(resource, limit, taken)
        self.held.add(call)
        return call

    def settle(self, held: Spent, cost: Spent) -> None:
        """The call ended: what was held is free again, what it did cost is spent."""
        self.held.take_back(held)
        self.spent.add(cost)
