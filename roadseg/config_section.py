"""What sections of the configuration are made of: frozen pydantic models, and the fields that name a result."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

OUT: dict[str, Any] = {"in_key": False}
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

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
