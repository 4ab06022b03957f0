"""What the API takes: fields that check a value and describe themselves for OpenAPI, so that the two cannot differ."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ...state.errors import ConfigError

LATEST_MS: Final = 253_402_300_799_999
"""The end of the year 9999."""


class Field(ABC):
    """One kind of value."""

    @abstractmethod
    def read(self, setting: str, value: Any) -> Any:
        """The value, checked. Of a query it comes as text, of a body as JSON.

        Raises:
            ConfigError: it is none of these.
        """

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""


@dataclass(frozen=True, slots=True)
class Whole(Field):
    """A whole number between two others, both included."""

    least: int = 0
    most: int = 2**63 - 1

    def read(self, setting: str, value: Any) -> int:
        """The number."""
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
            value = int(value)
        if type(value) is not int or not self.least <= value <= self.most:
            raise ConfigError(setting, value, f"give a whole number from {self.least:,} to {self.most:,}")
        return value

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


MOMENT: Final = Whole(0, LATEST_MS)
"""Milliseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Text(Field):
    """Text of a limited length, perhaps of a form."""

    most: int = 1_000
    pattern: str = ""
    remedy: str = ""

    def read(self, setting: str, value: Any) -> str:
        """The text."""
        if not isinstance(value, str) or len(value) > self.most:
            raise ConfigError(setting, value, f"give text of at most {self.most:,} characters")
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise ConfigError(setting, value, self.remedy)
        return value

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        schema: dict[str, Any] = {"type": "string", "maxLength": self.most}
        return {**schema, "pattern": f"^(?:{self.pattern})$"} if self.pattern else schema


@dataclass(frozen=True, slots=True)
class Choice(Field):
    """One of some words."""

    words: Sequence[str]

    def read(self, setting: str, value: Any) -> str:
        """The word."""
        if not isinstance(value, str) or value not in self.words:
            raise ConfigError(setting, value, f"give one of {', '.join(self.words)}")
        return value

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {"type": "string", "enum": list(self.words)}


@dataclass(frozen=True, slots=True)
class Flag(Field):
    """True or false, of a body."""

    def read(self, setting: str, value: Any) -> bool:
        """Which."""
        if not isinstance(value, bool):
            raise ConfigError(setting, value, "give true or false")
        return value

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class OneOf(Field):
    """A value of the first kind that takes it."""

    kinds: Sequence[Field]

    def read(self, setting: str, value: Any) -> Any:
        """The value."""
        remedies = []
        for kind in self.kinds:
            try:
                return kind.read(setting, value)
            except ConfigError as error:
                remedies.append(error.remedy)
        raise ConfigError(setting, value, "; or ".join(remedies))

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {"anyOf": [kind.schema() for kind in self.kinds]}


@dataclass(frozen=True, slots=True)
class Listed(Field):
    """A list of limited length, of a body."""

    of: Field
    most: int = 1_000

    def read(self, setting: str, value: Any) -> list[Any]:
        """Its values."""
        if not isinstance(value, list) or len(value) > self.most:
            raise ConfigError(setting, value, f"give a list of at most {self.most:,}")
        return [self.of.read(f"{setting}[{place}]", each) for place, each in enumerate(value)]

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {"type": "array", "items": self.of.schema(), "maxItems": self.most}


@dataclass(frozen=True, slots=True)
class Record(Field):
    """An object with these fields and no others; those that are not ``needed`` may be absent or null."""

    fields: Mapping[str, Field]
    needed: frozenset[str] = field(default_factory=frozenset)

    def read(self, setting: str, value: Any) -> dict[str, Any]:
        """The fields that are there."""
        if not isinstance(value, dict):
            raise ConfigError(setting, value, "give a JSON object")
        prefix = "" if setting == "body" else f"{setting}."
        for name in value:
            if name not in self.fields:
                known = ", ".join(self.fields) or "none"
                raise ConfigError(f"{prefix}{name}"[:200], value[name], f"there is no such field; known are {known}")
        for name in sorted(self.needed):
            if value.get(name) is None:
                raise ConfigError(f"{prefix}{name}", None, "it is needed")
        return {
            name: self.fields[name].read(f"{prefix}{name}", each) for name, each in value.items() if each is not None
        }

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {
            "type": "object",
            "properties": {
                name: kind.schema() if name in self.needed else {"anyOf": [kind.schema(), {"type": "null"}]}
                for name, kind in self.fields.items()
            },
            "required": sorted(self.needed),
            "additionalProperties": False,
        }
