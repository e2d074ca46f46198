"""What planning needs to know about a contract, worked out once, and how sources fit into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.domain.contract import Contract
from app.domain.plan import Fit
from app.domain.schema_shape import Schema, follow, referenced
from app.domain.subsume import lookup, subsumes
from app.kit.json_pointer import PointerMissing, escape, tokens

VIEWS_KEPT_MAX = 8_192
FITS_KEPT_MAX = 1_024

_UNKNOWN = False
# Keywords that are decided property by property, or that decide nothing.
_PROPERTYWISE = frozenset(
    {"type", "properties", "required", "additionalProperties", "unevaluatedProperties"}
)
_ANNOTATIONS = frozenset(
    {
        "$comment",
        "$defs",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "default",
        "definitions",
        "deprecated",
        "description",
        "examples",
        "format",
        "readOnly",
        "title",
        "writeOnly",
    }
)


class Want(NamedTuple):
    """A declared property as an input. `name` is its facet, or its key when no facet speaks."""

    key: str
    name: str
    facet: str | None
    required: bool


class Fitting(NamedTuple):
    """How a source fits; `fit` None is a provable mismatch."""

    fit: Fit | None
    why: str


@dataclass(slots=True, eq=False)
class View:
    """A contract read for planning.

    `wanted` also names keys that the schema requires without declaring them. `across` says that
    top-level keywords span properties (`anyOf`, `minProperties` …): property by property they can
    not be decided. `refuses_unknown_keys` is claimed only where nothing else could allow a key.
    `offered` gives the pointer of every declared property by its name.
    """

    contract: Contract
    wanted: tuple[Want, ...]
    required: tuple[str, ...]
    known: frozenset[str]
    offered: dict[str, str]
    across: bool
    limits_unknown_keys: bool
    refuses_unknown_keys: bool
    _fits: dict[tuple[int, str, str | bool | None], tuple[View, Fitting]]

    def spans(self, keys: Iterable[str]) -> bool:
        """Whether a rule for the value as a whole has a say when these keys are given."""
        return self.across or (self.limits_unknown_keys and not self.known.issuperset(keys))

    def schema_of(self, key: str) -> Schema:
        """What is asked of a key; unknown keys are answered for by `spans`."""
        declared = self.contract.properties.get(key)
        return True if declared is None else declared.schema

    def fit(self, producer: View, pointer: str, key: str | None) -> Fitting:
        """How a part of a producer's output fits a property, or the whole (`key` None)."""
        # Callers write the pointers, so the memory is bounded. It holds the producer, because an
        # id is only unique while its object lives. Unknown keys are all alike.
        asked = key if key is None or key in self.known else _UNKNOWN
        remembered = self._fits.get((id(producer), pointer, asked))
        if remembered is None:
            if len(self._fits) >= FITS_KEPT_MAX:
                self._fits.clear()
            remembered = (producer, _fit(self, producer, pointer, key))
            self._fits[(id(producer), pointer, asked)] = remembered
        return remembered[1]

    def fit_of_given(self, key: str, pointer: str) -> Fitting:
        """The fit of a value that was checked: by name when the run's inputs name the facet."""
        declared = self.contract.properties.get(key)
        if declared is None or declared.facet is None:
            return CHECKED
        if pointer not in ("/" + escape(declared.facet), "/" + escape(key)):
            return CHECKED
        why = f"given as facet {declared.facet!r} {declared.facet_version}, and checked"
        return Fitting(Fit.SAME_FACET, why)


CHECKED = Fitting(Fit.SUBSUMED, "the given value was checked")
_views: dict[int, View] = {}


def view_of(contract: Contract) -> View:
    """The view of a contract, remembered for as long as there is room."""
    # By id: hashing a schema costs more than planning a node. The view holds the contract, so
    # the id can not pass to another one meanwhile.
    found = _views.get(id(contract))
    if found is None:
        if len(_views) >= VIEWS_KEPT_MAX:
            _views.clear()
        found = _views[id(contract)] = _read(contract)
    return found


def wants_of(contract: Contract) -> tuple[Want, ...]:
    """What an input contract takes: its declared properties, and keys that it only requires."""
    declared = contract.properties
    wants = [Want(p.key, p.facet or p.key, p.facet, p.required) for p in declared.values()]
    required = _body(contract).get("required", ())
    wants += [Want(key, key, None, True) for key in required if key not in declared]
    return tuple(wants)


def _body(contract: Contract) -> dict[str, Any]:
    top = follow(contract.schema, contract.schema)
    return top if isinstance(top, dict) else {}


def _read(contract: Contract) -> View:
    body = _body(contract)
    wanted = wants_of(contract)
    extras = [body.get(name) for name in ("additionalProperties", "unevaluatedProperties")]
    kinds = body.get("type", "object")
    across = bool(body.keys() - _PROPERTYWISE - _ANNOTATIONS) or "object" not in kinds
    if body is not contract.schema:
        # The body stands behind a reference: whatever is said beside that has a say as well.
        across = across or contract.schema.keys() - _ANNOTATIONS != {"$ref"}
        across = across or referenced(contract.schema, contract.schema["$ref"]) is not body
    return View(
        contract=contract,
        wanted=wanted,
        required=tuple(want.key for want in wanted if want.required),
        known=frozenset(want.key for want in wanted),
        offered={want.name: "/" + escape(want.key) for want in wanted},
        across=across,
        limits_unknown_keys=any(isinstance(found, dict) and found for found in extras),
        refuses_unknown_keys=not contract.accepts_any_key and not across,
        _fits={},
    )


def _fit(consumer: View, producer: View, pointer: str, key: str | None) -> Fitting:
    root = producer.contract.schema
    try:
        found = lookup(root, pointer)
    except PointerMissing:
        return Fitting(None, f"{pointer!r} is no JSON pointer")
    if found.outcome == "absent":
        return Fitting(None, f"it never has anything at {pointer!r}")
    missing = ""
    if not found.is_guaranteed and (key is None or key in consumer.required):
        missing = "; it may be missing, which is checked at run"
    facet = _same_facet(consumer, producer, pointer, key)
    if facet is not None:
        return Fitting(Fit.CHECKED_AT_RUN if missing else Fit.SAME_FACET, facet + missing)
    whole = consumer.contract.schema
    general = whole if key is None else consumer.schema_of(key)
    verdict = subsumes(general, found.schema, general_root=whole, specific_root=root)
    if verdict.outcome == "no":
        at = f"{verdict.pointer}: " if verdict.pointer else ""
        return Fitting(None, at + verdict.why)
    if verdict.outcome == "undecided":
        return Fitting(Fit.CHECKED_AT_RUN, (verdict.why or "its schema says too little") + missing)
    fit = Fit.CHECKED_AT_RUN if missing else Fit.SUBSUMED
    return Fitting(fit, "every value that the source allows fits" + missing)


def _same_facet(consumer: View, producer: View, pointer: str, key: str | None) -> str | None:
    """Which facet both sides name in one version, if they do."""
    path = tokens(pointer)
    wanted = consumer.contract.properties.get(key) if key is not None else None
    made = producer.contract.properties.get(path[0]) if len(path) == 1 else None
    if wanted is None or made is None or wanted.facet is None:
        return None
    if (wanted.facet, wanted.facet_version) != (made.facet, made.facet_version):
        return None
    return f"both sides name facet {wanted.facet!r} {wanted.facet_version}"
