"""Embeddings through the gateway: a text goes in, its vector comes out.

Selection, budget, breaker, retries and records are those of prompts. Vectors of two models do not
compare, so that a caller who names models never gets the vector of another one. Nothing is cached:
whoever embeds keeps the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.domain.chat import Embeddings, ModelRole
from app.llm.calls import Asker, ModelCalls, ModelRequest
from app.llm.catalog import Catalog, Model
from app.llm.search import MODELS_MAX, NO_ANSWER, ModelSearch
from app.llm.selector import Need
from app.ports import Embedded


async def embed(
    catalog: Catalog,
    calls: ModelCalls,
    timeout_s: float,
    text: str,
    models: Sequence[str],
    asker: Asker,
) -> Embedded:
    """The vector of a text by the first of `models` that gives one; by any when it is empty.

    `timeout_s` limits a call whose provider sets no limit. Raises `PromptFailed`, and
    `BudgetExhausted`.
    """
    need = Need(
        role=ModelRole.EMBEDDING,
        texts=(text,),
        preferred=tuple(models),
        forbidden=catalog.models.keys() - set(models) if models else (),
    )
    search = ModelSearch(catalog, need, asker)
    for _ in range(MODELS_MAX):
        model = search.next()
        if model is None:
            break
        call = _call_of(model, text, catalog.counters[model.name]([text]), calls, timeout_s, asker)
        try:
            found, _ = await calls.call(call, asker)
        except NO_ANSWER as error:
            search.gave_none(model, error)
        else:
            return Embedded(model.name, found.vectors[0])
    raise search.failure()


def _call_of(
    model: Model, text: str, tokens: int, calls: ModelCalls, timeout_s: float, asker: Asker
) -> ModelRequest[Embeddings]:
    limit_s = calls.timeout_s(model, timeout_s, asker)
    return ModelRequest(
        model=model,
        role=ModelRole.EMBEDDING,
        prompt_tokens=tokens,
        output_tokens_max=0,
        timeout_s=limit_s,
        send=lambda provider: provider.embed(model.vendor_name, [text], limit_s),
        output_tokens=lambda _: 0,
        judge=lambda _: None,
    )
