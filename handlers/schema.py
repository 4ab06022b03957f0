"""Schemas: what a row must look like before a stage, or after it.

A schema is a dataclass, a TypedDict, or a pydantic model. It is compiled once into a :class:`Validator`. Dataclasses
and TypedDicts are checked by ``shapes.py``. pydantic does its own checking; nothing here imports it, since whoever
hands over a model has done so.

One rule holds for all of them: a value is checked as the JSON that it is, or that it will be written as. Nothing is
converted on the way, text is no number, ``true`` is no number either, an integer will do for a float. A row that fits
goes on unchanged, with fields that the schema does not know.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from functools import wraps
from typing import Any, Literal, TypeAlias

from ..state.codec import encode, loads
from ..state.errors import BadRowError, ConfigError
from ..state.model import Row
from .errors import ResultSchemaError, SchemaError
from .shapes import JSON_CLASSES, Compiler, Misfit, RefusedError, inner_path, is_typed_dict, shown

Side: TypeAlias = Literal["input", "result"]


class Validator(ABC):
    """A compiled schema. May be used by many threads at once.

    Args:
        name: the schema's, for messages.
        side: what is checked: the ``input`` of a stage or pipeline, or a ``result``.
    """

    def __init__(self, name: str, side: Side) -> None:
        self.name = name
        self.side = side

    @abstractmethod
    def check(self, row: Row) -> Row:
        """The row itself, unchanged.

        Raises:
            SchemaError: it does not fit.
        """

    @abstractmethod
    def parse(self, row: Row) -> Any:
        """The row as an object of the schema: an instance of the dataclass or model; a TypedDict is the row itself.

        Raises:
            SchemaError: it does not fit.
        """

    def _misfit(self, misfits: Sequence[Misfit]) -> SchemaError:
        return (SchemaError if self.side == "input" else ResultSchemaError)(self.side, self.name, misfits)


def make_validator(schema: Any, *, side: Side = "input", setting: str = "schema") -> Validator:
    """Compile a schema.

    Args:
        schema: a dataclass, a TypedDict, a pydantic 2 model or dataclass, or a pydantic TypeAdapter.
        side: whether inputs are checked or results; it stands in messages, and only a misfit of a result is retried.
        setting: the option's name as the caller wrote it, for messages.

    Raises:
        ConfigError: it is none of these, or a field has a type that no JSON value has.
    """
    if side not in {"input", "result"}:
        raise ConfigError("make_validator(side=)", side, "give 'input' or 'result'")
    if _is_pydantic(schema):
        return _PydanticValidator(schema, side, setting)
    if isinstance(schema, type) and (dataclasses.is_dataclass(schema) or is_typed_dict(schema)):
        return _OwnValidator(schema, side, setting)
    raise ConfigError(setting, schema, "give a dataclass, a TypedDict, or a pydantic 2 model (the class itself)")


# --- dataclasses and TypedDicts --------------------------------------------------------------------------------


class _OwnValidator(Validator):
    def __init__(self, schema: type, side: Side, setting: str) -> None:
        super().__init__(schema.__qualname__.rpartition(".")[2], side)
        compiler = Compiler(setting)
        node = compiler.compile(schema, schema.__name__)
        self._node = node
        self._fits = node.fits
        self._is_judged = compiler.is_judged

    def check(self, row: Row) -> Row:
        if self._is_judged:
            self.parse(row)
        elif not self._fits(row):
            self._explain(row)
        return row

    def parse(self, row: Row) -> Any:
        if not self._fits(row):
            self._explain(row)
            row = self._as_json(row)
        try:
            return self._node.build(row)
        except RefusedError as refused:
            raise self._misfit([Misfit("", f"{refused.schema} refuses it: {refused}", "")]) from refused.__cause__

    def _as_json(self, row: Row) -> Row:
        try:
            json: Row = loads(encode(row))
        except BadRowError as error:
            raise self._misfit([Misfit("", str(error), "")]) from None
        return json

    def _explain(self, row: Row) -> None:
        """Find out what is amiss: nothing, if the row will fit once it is JSON."""
        misfits: list[Misfit] = []
        self._node.explain(row, "", misfits)
        if misfits:
            raise self._misfit(misfits)


# --- pydantic --------------------------------------------------------------------------------------------------


def _is_pydantic(schema: Any) -> bool:
    """Whether it is a model, a dataclass or a TypeAdapter of pydantic 2, without importing it for those without."""
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None or not hasattr(pydantic, "TypeAdapter"):
        return False
    if isinstance(schema, pydantic.TypeAdapter):
        return True
    if not isinstance(schema, type):
        return False
    return issubclass(schema, pydantic.BaseModel) or pydantic.dataclasses.is_pydantic_dataclass(schema)


class _PydanticValidator(Validator):
    """Strict, as JSON is checked here, unless the model's own configuration says ``strict=``."""

    def __init__(self, schema: Any, side: Side, setting: str) -> None:
        pydantic: Any = sys.modules["pydantic"]
        self._error: type[Exception] = pydantic.ValidationError
        is_adapter = isinstance(schema, pydantic.TypeAdapter)
        super().__init__(str(schema) if is_adapter else schema.__name__, side)
        adapter = schema if is_adapter else _adapter(pydantic, schema, setting)
        config = getattr(schema, "model_config", None) or getattr(schema, "__pydantic_config__", None) or {}
        self._strict = None if is_adapter or "strict" in config else True
        self._validate: Callable[..., Any] = adapter.validate_json

    def check(self, row: Row) -> Row:
        self.parse(row)
        return row

    def parse(self, row: Row) -> Any:
        try:
            return self._validate(encode(row), strict=self._strict)
        except BadRowError as error:
            raise self._misfit([Misfit("", str(error), "")]) from None
        except self._error as error:
            raise self._misfit([_translated(found, row) for found in _details(error)]) from None


def _adapter(pydantic: Any, schema: Any, setting: str) -> Any:
    try:
        if getattr(schema, "__pydantic_complete__", True) is False:
            schema.model_rebuild()
        return pydantic.TypeAdapter(schema)
    except Exception as error:  # noqa: BLE001 - its own classes of errors, and whatever a model's hooks raise
        told = str(error).partition("\n")[0]
        raise ConfigError(setting, schema, f"pydantic cannot use it ({told}); define what it names first") from None


def _details(error: Any) -> Iterable[Mapping[str, Any]]:
    found: Iterable[Mapping[str, Any]] = error.errors(include_url=False, include_context=False)
    return found


def _translated(found: Mapping[str, Any], row: Any) -> Misfit:
    path = _path(found["loc"], row, is_missing=found["type"] == "missing")
    if found["type"] == "missing":
        return Misfit(path, "missing", "")
    message = str(found["msg"])
    told = message.removeprefix("Input should be ")
    return Misfit(path, f"expected {told}" if told != message else message, shown(found["input"]))


def _path(places: Sequence[str | int], value: Any, *, is_missing: bool) -> str:
    """pydantic's path without the names of union members and the like: those steps that the row has, too."""
    path = ""
    for number, place in enumerate(places):
        is_last = number == len(places) - 1
        if isinstance(value, dict) and (place in value or (is_missing and is_last)):
            path, value = inner_path(path, str(place)), value.get(place)
        elif isinstance(value, (list, tuple)) and isinstance(place, int) and place < len(value):
            path, value = f"{path}[{place}]", value[place]
    return path


# --- around handlers -------------------------------------------------------------------------------------------


def row_of(result: Any) -> Any:
    """A handler's result with objects of a schema in it, as rows: dataclasses and pydantic models become dicts.

    Decimals inside of objects become text, as they are read; everything that is no such object stays as it is.
    """
    if isinstance(result, (list, tuple)):
        return [row_of(item) for item in result]
    if isinstance(result, type) or result.__class__ in JSON_CLASSES:
        return result
    if hasattr(result, "__pydantic_validator__") and _is_pydantic(type(result)):
        return _dump(result)
    return _plain(result) if dataclasses.is_dataclass(result) else result


def _dump(instance: Any) -> Any:
    if hasattr(instance, "model_dump"):
        return instance.model_dump(mode="json", by_alias=True)
    pydantic: Any = sys.modules["pydantic"]
    return pydantic.TypeAdapter(type(instance)).dump_python(instance, mode="json", by_alias=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Decimal) else value


def with_objects(
    handler: Callable[..., Any], *, takes: Validator | None = None, is_async: bool, batch: bool = False
) -> Callable[..., Any]:
    """A handler that may give objects of a schema (:func:`row_of` makes them rows), and may be given them.

    Args:
        handler: of (row) or (row, ctx).
        takes: the input's schema, where the handler gets its objects instead of rows; None: it gets rows.
        is_async: whether calling the handler gives something to await.
        batch: whether it takes a list of rows.
    """

    def read(given: Any) -> Any:
        if takes is None:
            return given
        return [takes.parse(row) for row in given] if batch else takes.parse(given)

    if is_async:

        @wraps(handler)
        async def with_objects_async(given: Any, *context: Any) -> Any:
            return row_of(await handler(read(given), *context))

        return with_objects_async

    @wraps(handler)
    def with_objects_here(given: Any, *context: Any) -> Any:
        return row_of(handler(read(given), *context))

    return with_objects_here
