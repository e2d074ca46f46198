"""Binds the run's output to what the nodes produce, and proves it.

Which part comes from where follows the mode of the output contract:

    facets       each facet from the last node in order that produces it, else from the inputs
    json_schema  each top-level property likewise, matched by facet name or key; a property of no
                 facet only from a sink; a schema without properties takes the sink's output whole
    freeform     the sink's output, or an object keyed by node id when there are several sinks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.contract import Contract
from app.domain.errors import Fault
from app.domain.plan import Fit, OutputSource, ProofStep
from app.kit.json_pointer import escape
from app.planner.order import Node, given_key
from app.planner.prove import Prover
from app.planner.view import Fitting, View, Want, view_of


@dataclass(slots=True)
class _Maker:
    """The last node in order that produces a part, and how many do."""

    node: Node
    pointer: str
    count: int


def prove_output(
    contract: Contract,
    order: list[Node],
    inputs: Mapping[str, Any],
    prover: Prover,
    *,
    strict: bool,
) -> tuple[OutputSource, ...]:
    """Where the output comes from; its steps and faults go to the prover.

    Faults: OUTPUT_FACET_UNCOVERED, OUTPUT_MISMATCH, PROOF_TOO_WEAK, with pointers into the
    envelope.
    """
    binder = _OutputBinder(view_of(contract), order, inputs, prover, strict)
    if binder.view.wanted:
        binder.by_parts()
    else:
        binder.whole()
    return tuple(binder.sources)


class _OutputBinder:
    def __init__(
        self,
        view: View,
        order: list[Node],
        inputs: Mapping[str, Any],
        prover: Prover,
        strict: bool,
    ) -> None:
        self.view = view
        self.sources: list[OutputSource] = []
        self._order = order
        self._inputs = inputs
        self._prover = prover
        self._strict = strict
        required = {source for node in order for source in node.requires}
        self._sinks = [node for node in order if node.draft.id not in required]

    def whole(self) -> None:
        """The output of the sink, or of all sinks by node id."""
        if len(self._sinks) == 1:
            sink = self._sinks[0]
            self._accept("", None, sink, "", self.view.fit(sink.output, "", None), "")
            return
        if self.view.contract.is_trivial:
            fitting = Fitting(Fit.SUBSUMED, "any object is accepted")
        else:
            why = "several sinks make one object; the check of the output decides"
            fitting = Fitting(Fit.CHECKED_AT_RUN, why)
        for sink in self._sinks:
            self._accept(sink.draft.id, sink.draft.id, sink, "", fitting, "")

    def by_parts(self) -> None:
        """One source for each property that something gives."""
        by_facet, by_key = self._makers()
        for want in self.view.wanted:
            maker = by_facet.get(want.name)
            if maker is None and want.facet is None:
                maker = by_key.get(want.key) or self._silent_sink(want.key)
            if maker is not None:
                note = "" if maker.count == 1 else f"the last of {maker.count} that produce it; "
                fitting = self.view.fit(maker.node.output, maker.pointer, want.key)
                self._accept(want.key, want.key, maker.node, maker.pointer, fitting, note)
            elif (key := given_key(want, self._inputs)) is not None:
                self._accept_given(want, key)
            elif want.required:
                self._uncovered(want)
        if self.view.spans(want.key for want in self.view.wanted):
            why = "a rule spans several parts; the check of the output decides it"
            self._step("", None, "", Fitting(Fit.CHECKED_AT_RUN, why))

    def _makers(self) -> tuple[dict[str, _Maker], dict[str, _Maker]]:
        """The makers of every part, by facet name and by key."""
        by_facet: dict[str, _Maker] = {}
        by_key: dict[str, _Maker] = {}
        sinks = {node.place for node in self._sinks}
        for node in self._order:
            of_facets = node.output.contract.mode == "facets"
            for offer in node.output.wanted:
                pointer = node.output.offered[offer.name]
                if offer.facet is not None:
                    _note_maker(by_facet, offer.facet, node, pointer)
                if of_facets or node.place in sinks:
                    _note_maker(by_key, offer.key, node, pointer)
        return by_facet, by_key

    def _silent_sink(self, key: str) -> _Maker | None:
        """A single sink whose contract declares nothing may well produce a schema's property."""
        if len(self._sinks) != 1 or self.view.contract.mode == "facets":
            return None
        sink = self._sinks[0]
        if sink.output.wanted or sink.output.refuses_unknown_keys:
            return None
        return _Maker(sink, "/" + escape(key), 1)

    def _accept(
        self, part: str, key: str | None, node: Node, pointer: str, fitting: Fitting, note: str
    ) -> None:
        source = node.draft.id
        if fitting.fit is None:
            what = f"does not fit the part {part!r} of" if part else "does not fit"
            self._refuse(
                "OUTPUT_MISMATCH",
                f"what {source!r} produces {what} the output contract: {fitting.why}",
                self._at(part),
                node,
            )
            return
        self.sources.append(OutputSource(key, source, pointer))
        self._step(part, source, pointer, Fitting(fitting.fit, note + fitting.why))

    def _accept_given(self, want: Want, given: str) -> None:
        pointer = "/" + escape(given)
        broken = self._prover.value_faults(self.view, want.key, pointer)
        for fault in broken:
            rest = fault.pointer[len(escape(want.key)) + 1 :]
            why = f"the value given for {want.key!r} does not fit: {fault.message}"
            self._refuse("OUTPUT_MISMATCH", why, "/inputs" + pointer + rest, None, want.facet)
        if not broken:
            fitting = self.view.fit_of_given(want.key, pointer)
            self.sources.append(OutputSource(want.key, "inputs", pointer))
            self._step(want.key, "inputs", pointer, fitting)

    def _uncovered(self, want: Want) -> None:
        self._refuse(
            "OUTPUT_FACET_UNCOVERED",
            f"nothing in the plan or the inputs gives {want.name!r}, which the output needs",
            self._at(want.key),
            None,
            want.facet,
        )

    def _step(self, key: str, source: str | None, pointer: str, fitting: Fitting) -> None:
        fit, why = fitting
        assert fit is not None
        if fit is Fit.CHECKED_AT_RUN and self._strict:
            what = f"the part {key!r} of the output" if key else "the output"
            self._refuse("PROOF_TOO_WEAK", f"{what} can not be proved: {why}", self._at(key), None)
        self._prover.steps.append(ProofStep(None, key, source, pointer, fit, why))

    def _at(self, key: str) -> str:
        """Where the output contract speaks of a part."""
        contract = self.view.contract
        if contract.mode == "facets":
            names = [want.name for want in self.view.wanted if want.key == key]
            if names and names[0] in contract.facets:
                return f"/output_contract/facets/{contract.facets.index(names[0])}"
        elif key in contract.properties:
            return "/output_contract/schema/properties/" + escape(key)
        return "/output_contract"

    def _refuse(
        self, code: str, message: str, pointer: str, node: Node | None, facet: str | None = None
    ) -> None:
        self._prover.faults.append(
            Fault(
                code,
                message,
                pointer,
                facet=facet,
                node_id=None if node is None else node.draft.id,
                capability_id=None if node is None else node.draft.capability_id,
            )
        )


def _note_maker(makers: dict[str, _Maker], name: str, node: Node, pointer: str) -> None:
    earlier = makers.get(name)
    makers[name] = _Maker(node, pointer, 1 if earlier is None else earlier.count + 1)
