"""Base of the config sections: frozen pydantic models, and which fields are part of a stage's key."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

OUT: dict[str, Any] = {"in_key": False}
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic accepts true as 1, and YAML reads `off` as false; both are mistakes where a number is expected."""
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, bool) for v in values):
            kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("expected a number, not true or false")
        return value

    def key_fields(self) -> dict[str, Any]:
        """The fields that change a result, JSON-ready."""
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("in_key") is False:
                continue
            value = getattr(self, name)
            if isinstance(value, Section):
                kept[name] = value.key_fields()
            elif isinstance(value, dict):
                kept[name] = {k: v.key_fields() if isinstance(v, Section) else v for k, v in value.items()}
            else:
                kept[name] = self.model_dump(mode="json")[name]
        return kept


def _kinds(annotation: Any) -> set[Any]:
    """All types in an annotation, such as {int, NoneType} of `int | None`."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}
