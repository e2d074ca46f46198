"""The standard pack: the capabilities that every Flexrun has from the start."""

from __future__ import annotations

from app.adapters.capabilities.builtin import Pack
from app.adapters.capabilities.egress_transport import EgressTransport
from app.adapters.capabilities.pack_documents import DOCUMENTS_PACK
from app.adapters.capabilities.pack_fetch import fetch_pack
from app.adapters.capabilities.pack_json import JSON_PACK
from app.adapters.capabilities.pack_models import MODELS_PACK

STANDARD_PACK = Pack.union("standard", (JSON_PACK, DOCUMENTS_PACK))
"""Everything that works without the network."""


def standard_packs(transport: EgressTransport) -> tuple[Pack, ...]:
    """The standard pack, what asks models, and `http.fetch` over the given transport."""
    return (STANDARD_PACK, MODELS_PACK, fetch_pack(transport))
