"""Facets: named pieces of a contract, one property each, with its JSON Schema and its meaning.

Only shapes live here. Whether a facet's schema is sound is for `json_schema`, how facets become a
contract is for `contract`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

FACET_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,119}$"
FacetName = Annotated[str, StringConstraints(pattern=FACET_NAME_PATTERN)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4_000)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Side = Literal["input", "output"]


class Direction(StrEnum):
    """The sides of a capability on which a facet may stand."""

    INPUT = "input"
    OUTPUT = "output"
    BIDIRECTIONAL = "bidirectional"


class _Strict(BaseModel):
    # `json_schema` is spelled `schema` outside: BaseModel has a method of that name.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )


class Semantics(_Strict):
    """What the value means, for whoever has to make it. `checkpoints` are things to look at."""

    instruction: Text
    summary: str | None = Field(default=None, max_length=2_000)
    checkpoints: tuple[Text, ...] = Field(default=(), max_length=50)


def _semantics_from_text(value: Any) -> Any:
    return {"instruction": value} if isinstance(value, str) else value


def _direction_from_both(value: Any) -> Any:
    return Direction.BIDIRECTIONAL if value == "both" else value


class FacetMetadata(_Strict):
    """`property_key` names the property when it is not the facet's own name."""

    version: str = Field(default="1.0.0", max_length=64, pattern=r"^[0-9A-Za-z][0-9A-Za-z.+\-]*$")
    direction: Annotated[Direction, BeforeValidator(_direction_from_both)] = Direction.BIDIRECTIONAL
    depends_on: tuple[FacetName, ...] = Field(default=(), max_length=100)
    owner: str | None = Field(default=None, max_length=200)
    tags: tuple[Tag, ...] = Field(default=(), max_length=100)
    required_by_default: bool = True
    property_key: str | None = Field(default=None, min_length=1, max_length=120)


class Facet(_Strict):
    """One entry of the facet catalog; also the body of `POST /v1/facets`.

    JSON: `{name, title, description, schema, semantics, metadata}`. A bare string as `semantics`
    is its instruction, and "both" as a direction is `bidirectional`.
    """

    name: FacetName
    title: str = Field(min_length=1, max_length=200)
    description: str = Field(default="", max_length=4_000)
    json_schema: dict[str, Any] = Field(alias="schema")
    semantics: Annotated[Semantics, BeforeValidator(_semantics_from_text)]
    metadata: FacetMetadata = FacetMetadata()

    @property
    def key(self) -> str:
        """The name of the property that this facet adds to a contract."""
        return self.metadata.property_key or self.name

    @property
    def version(self) -> str:
        return self.metadata.version

    def stands_on(self, side: Side) -> bool:
        """Whether the facet may be used on this side of a capability."""
        direction = self.metadata.direction
        return direction is Direction.BIDIRECTIONAL or direction.value == side
