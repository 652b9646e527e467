"""What all sections of a recipe have in common, and the types of their values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from labeler.base.settings import Settings

Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]  # torch crashes if the system cannot start that many
Number = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Range = tuple[Rate, Rate]
Color = tuple[float, float, float]
Argument = bool | int | float | str
Byte = Annotated[int, Field(ge=0, le=255)]
Stores = Annotated[tuple[str, ...], Field(min_length=1)]


class Section(Settings):
    """A section of a recipe."""

    @field_validator("*")
    @classmethod
    def _usable_text(cls, value: Any, info: ValidationInfo) -> Any:
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        if any(not text or "\0" in text for text in texts):
            fault = "contains a zero byte" if all(texts) else "is empty"
            raise ValueError(f"{info.field_name} {fault}; give a path or a name")
        return value
