"""Protocols, one for each seam with more than one implementation, and what passes through them."""

from __future__ import annotations

from app.ports.breakers import (
    Breakers,
    BreakerStatus,
    BreakerView,
    Permit,
    Refused,
    Transition,
    TransitionKind,
)
from app.ports.calls import (
    NO_TOOLS,
    Call,
    CallFailed,
    CallRefused,
    CapabilityAdapter,
    Embed,
    Embedded,
    Tools,
    no_embedding,
    no_model,
)
from app.ports.models import HotAnswers, Provider
from app.ports.processes import Delta, DeltaRelay, Topic, WakeUps
from app.ports.traces import Exported, RunTrace, TraceExporter

__all__ = [
    "BreakerStatus",
    "BreakerView",
    "Breakers",
    "Call",
    "CallFailed",
    "CallRefused",
    "CapabilityAdapter",
    "Delta",
    "DeltaRelay",
    "Embed",
    "Embedded",
    "Exported",
    "HotAnswers",
    "NO_TOOLS",
    "Permit",
    "Provider",
    "Refused",
    "RunTrace",
    "Tools",
    "Topic",
    "TraceExporter",
    "Transition",
    "TransitionKind",
    "WakeUps",
    "no_embedding",
    "no_model",
]
