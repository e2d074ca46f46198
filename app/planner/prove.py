"""Proves that every input of every node fits: by name, by schema, or on the value itself.

A value of the run's inputs and a constant are known, so they are checked here and now. The rest is
decided on the schemas of both sides; what can not be decided is left to the check before the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.errors import Fault
from app.domain.plan import Bound, Fit, ProofStep
from app.kit.json_pointer import PointerMissing, escape, resolve
from app.planner.order import Node
from app.planner.view import CHECKED, Fitting, View


class Prover:
    """Collects proof steps and faults while one plan is proved.

    `strict` refuses what is only checked at run time (PROOF_TOO_WEAK). The values of the run's
    inputs are looked up and checked once for each contract and key, however many nodes take them.
    """

    __slots__ = ("_inputs", "_nodes", "_seen", "_strict", "faults", "steps")

    def __init__(
        self, nodes: Mapping[str, Node], inputs: Mapping[str, Any], *, strict: bool
    ) -> None:
        self._nodes = nodes
        self._inputs = inputs
        self._strict = strict
        self._seen: dict[tuple[int, str, str], list[Fault]] = {}
        self.steps: list[ProofStep] = []
        self.faults: list[Fault] = []

    def prove_inputs(self, node: Node) -> None:
        """INPUT_UNBOUND, INPUT_MISMATCH and the steps of one node."""
        view = node.view
        before = len(self.faults)
        for key in view.required:
            if key not in node.bound:
                self.refuse(node, "INPUT_UNBOUND", f"the required input {key!r} is not bound")
        for key, bound in node.bound.items():
            fitting = self._fitting(node, key, bound)
            if fitting is not None and key in view.known:
                self._add(node, key, bound.source, bound.pointer, fitting)
        if view.spans(node.bound) and len(self.faults) == before:
            self._prove_across(node)

    def refuse(
        self, node: Node, code: str, message: str, pointer: str | None = None, key: str = ""
    ) -> None:
        """Add a fault of a node; without a pointer it is about the node's inputs as a whole."""
        declared = node.view.contract.properties.get(key)
        if pointer is None:
            pointer = node.draft.pointer if node.is_bound_by_name else node.draft.at("/inputs")
        self.faults.append(
            Fault(
                code,
                f"node {node.draft.id!r}: {message}",
                pointer,
                facet=None if declared is None else declared.facet,
                node_id=node.draft.id,
                capability_id=node.draft.capability_id,
            )
        )

    def value_faults(self, view: View, key: str, pointer: str) -> list[Fault]:
        """How a value of the run's inputs breaks a property; raises `PointerMissing`."""
        seen = self._seen.get((id(view), key, pointer))
        if seen is None:
            seen = _value_faults(view, key, resolve(self._inputs, pointer))
            self._seen[(id(view), key, pointer)] = seen
        return seen

    def _fitting(self, node: Node, key: str, bound: Bound) -> Fitting | None:
        """How a source fits an input, None after a refusal."""
        view = node.view
        if key not in view.known and view.refuses_unknown_keys:
            self.refuse(
                node, "INPUT_MISMATCH", f"there is no input {key!r}", _binding_at(node, key), key
            )
            return None
        if bound.source is None:
            return self._known(node, key, bound, _value_faults(view, key, bound.value))
        if bound.source == "inputs":
            try:
                return self._known(node, key, bound, self.value_faults(view, key, bound.pointer))
            except PointerMissing:
                why = f"the inputs have nothing at {bound.pointer!r} for {key!r}"
                self.refuse(node, "INPUT_UNBOUND", why, _binding_at(node, key), key)
                return None
        fitting = view.fit(self._nodes[bound.source].output, bound.pointer, key)
        if fitting.fit is None:
            why = f"the output of {bound.source!r} does not fit {key!r}: {fitting.why}"
            self.refuse(node, "INPUT_MISMATCH", why, _binding_at(node, key), key)
            return None
        return fitting

    def _known(self, node: Node, key: str, bound: Bound, broken: list[Fault]) -> Fitting | None:
        """A source whose value is known: it fits, or each way in which it does not is a fault."""
        for fault in broken:
            pointer = _value_at(node, key, bound) + fault.pointer[len(escape(key)) + 1 :]
            why = f"the value given for {key!r} does not fit: {fault.message}"
            self.refuse(node, "INPUT_MISMATCH", why, pointer, key)
        return None if broken else node.view.fit_of_given(key, bound.pointer)

    def _prove_across(self, node: Node) -> None:
        """The keywords that span several inputs: checked when all values are known, else later."""
        if any(bound.source not in (None, "inputs") for bound in node.bound.values()):
            why = "a rule spans several inputs; the check before the call decides it"
            self._add(node, "", None, "", Fitting(Fit.CHECKED_AT_RUN, why))
            return
        value = {
            key: bound.value if bound.source is None else resolve(self._inputs, bound.pointer)
            for key, bound in node.bound.items()
        }
        broken = node.view.contract.violations(value)
        for fault in broken:
            self.refuse(node, "INPUT_MISMATCH", f"the given values do not fit: {fault.message}")
        if not broken:
            self._add(node, "", None, "", CHECKED)

    def _add(
        self, node: Node, key: str, source: str | None, pointer: str, fitting: Fitting
    ) -> None:
        fit, why = fitting
        assert fit is not None
        if fit is Fit.CHECKED_AT_RUN and self._strict:
            at = _binding_at(node, key) if key else None
            self.refuse(node, "PROOF_TOO_WEAK", f"{key!r} can not be proved: {why}", at, key)
        note = node.notes.get(key, "") if node.notes else ""
        self.steps.append(ProofStep(node.draft.id, key, source, pointer, fit, note + why))


def _value_faults(view: View, key: str, value: Any) -> list[Fault]:
    if key not in view.contract.properties:
        return []
    return view.contract.property_violations(key, value)


def _binding_at(node: Node, key: str) -> str:
    """Where the envelope binds a key: at the node itself when it is bound by name."""
    return node.draft.pointer if node.is_bound_by_name else node.draft.at("/inputs/" + escape(key))


def _value_at(node: Node, key: str, bound: Bound) -> str:
    """Where the envelope holds a known value."""
    return "/inputs" + bound.pointer if bound.source else _binding_at(node, key) + "/value"
