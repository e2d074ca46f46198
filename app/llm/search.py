"""Model after model for one request, until one gives an answer; every choice is told."""

from __future__ import annotations

from dataclasses import replace

from app.domain.chat import LlmUnavailableError, ModelRole, PromptFailed
from app.domain.events import EventType
from app.llm.calls import Asker, BreakerOpenError, code_of
from app.llm.catalog import Catalog, Model
from app.llm.selector import Need, select

MODELS_MAX = 3
"""So many models are asked for one request when they give no answer, besides the reliable one."""

NoAnswer = TimeoutError | LlmUnavailableError | BreakerOpenError
NO_ANSWER = (TimeoutError, LlmUnavailableError, BreakerOpenError)


class ModelSearch:
    """The models that were asked, and why the last of them gave no answer."""

    def __init__(self, catalog: Catalog, need: Need, asker: Asker) -> None:
        self.passed_over: dict[str, str] = {}
        self._catalog = catalog
        self._need = need
        self._asker = asker
        self._open_breakers: dict[str, float] = {}
        self._last: NoAnswer | None = None

    def next(self, role: ModelRole | None = None) -> Model | None:
        """The best model that was not asked yet, in another role where one is given; None when
        there is none."""
        selection = select(
            self._catalog,
            self._need if role is None else replace(self._need, role=role),
            passed_over=self.passed_over,
            open_breakers=self._open_breakers,
        )
        self._asker.tell(EventType.MODEL_SELECTED, selection.as_dict())
        return None if selection.chosen is None else self._catalog.models[selection.chosen]

    def gave_none(self, model: Model, error: NoAnswer) -> None:
        """This model is not asked again; with an open breaker none of its provider is."""
        self._last = error
        if isinstance(error, BreakerOpenError):
            self._open_breakers[model.provider] = error.retry_after_s
        else:
            self.passed_over[model.name] = code_of(error)

    def failure(self) -> PromptFailed:
        """What to say when nobody is left to be asked."""
        match self._last:
            case None:
                return PromptFailed("no_compatible_model", "No model of the catalog can do this.")
            case BreakerOpenError():
                return PromptFailed(
                    "breaker_open",
                    "The providers of all compatible models are not worth calling now.",
                    retry_after_s=min(self._open_breakers.values()),
                )
            case TimeoutError():
                return PromptFailed("timeout", "The model did not answer in time.")
        return PromptFailed("llm_unavailable", self._last.message)
