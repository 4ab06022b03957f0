"""Shapes: dataclasses and TypedDicts, compiled into checks of JSON values.

A shape says quickly whether a value fits: two comparisons per field that is as it should be. Only where something is
amiss a second, slower walk finds the words for it. What it all means for stages is in ``schema.py``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, Literal, NamedTuple, TypeGuard
from uuid import UUID

from ..state.codec import encode, loads
from ..state.errors import BadRowError, ConfigError

_SHOWN_CHARACTERS = 60
JSON_CLASSES = frozenset({str, int, float, bool, type(None), list, dict})
"""The classes of Python values that are JSON as they stand, but for floats that are not finite."""


class Misfit(NamedTuple):
    """One place where a row does not fit: the path of the field, what was expected there, and what came.

    Without a path it is the row as a whole; ``got`` is "" where nothing came.
    """

    path: str
    expected: str
    got: str

    def __str__(self) -> str:
        text = f"{self.expected}, got {self.got}" if self.got else self.expected
        return f"field {self.path!r}: {text}" if self.path else text


class RefusedError(Exception):
    """A dataclass did not want to be made of a row that has the right types."""

    def __init__(self, schema: str, reason: str) -> None:
        super().__init__(reason)
        self.schema = schema


class _Absent:
    """The class of what stands for a field that is not there."""


_ABSENT = _Absent()


class Shape:
    """What one place of a row may hold.

    Attributes:
        expected: in words.
        classes: a value whose class is one of these fits without a further look. This is what makes checks quick.
        kinds: the JSON types it can have at all; ``float`` stands for all numbers.
        is_built: whether :meth:`build` gives something else than the value.
    """

    classes: frozenset[type] = frozenset()
    kinds: frozenset[type] = frozenset()
    is_built = False

    def __init__(self, expected: str) -> None:
        self.expected = expected

    def fits(self, value: Any) -> bool:
        """Whether a JSON value fits. Says no for what only becomes JSON when it is written."""
        return value.__class__ in self.classes

    def explain(self, value: Any, path: str, misfits: list[Misfit]) -> None:
        """Add what is amiss, if anything, judging values that are no JSON yet by what they will be written as."""
        if self.fits(value):
            return
        json = _as_json(value)
        if json is not value and self.fits(json):
            return
        self.explain_inside(json, value, path, misfits)

    def explain_inside(self, json: Any, value: Any, path: str, misfits: list[Misfit]) -> None:  # noqa: ARG002
        """As explain, for what is known not to fit as it stands: ``json``, which came as ``value``."""
        misfits.append(Misfit(path, f"expected {self.expected}", shown(value)))

    def build(self, value: Any) -> Any:
        """The Python object for a JSON value that fits."""
        return value


class _Anything(Shape):
    kinds = frozenset({str, float, bool, type(None), list, dict})

    def fits(self, value: Any) -> bool:
        return value is not _ABSENT


class _Null(Shape):
    classes = kinds = frozenset({type(None)})


class _Bool(Shape):
    classes = kinds = frozenset({bool})


class _Text(Shape):
    classes = kinds = frozenset({str})

    def fits(self, value: Any) -> bool:
        return isinstance(value, str)


class _Integer(Shape):
    classes = frozenset({int})
    kinds = frozenset({float})

    def fits(self, value: Any) -> bool:
        return isinstance(value, int) and value.__class__ is not bool


class _Number(Shape):
    classes = frozenset({int})
    kinds = frozenset({float})

    def fits(self, value: Any) -> bool:
        """Numbers that JSON has: NaN and the infinities would be written as null."""
        if isinstance(value, float):
            return bool(value - value == 0)
        return isinstance(value, int) and value.__class__ is not bool


class _Read(Shape):
    """Text with a meaning: a moment, a date, a UUID. It fits if ``read`` takes it, and is built by ``read``."""

    kinds = frozenset({str})
    is_built = True

    def __init__(self, expected: str, pattern: str, read: Callable[[str], Any]) -> None:
        super().__init__(expected)
        self._matches = re.compile(pattern, re.ASCII).fullmatch
        self._read = read

    def fits(self, value: Any) -> bool:
        if not isinstance(value, str) or not self._matches(value):
            return False
        try:
            self._read(value)
        except (ValueError, ArithmeticError):
            return False
        return True

    def build(self, value: Any) -> Any:
        return self._read(value)


class _Decimal(_Read):
    """A decimal number as text, or an integer. No JSON number with a point: as a float it has lost its exact value."""

    classes = frozenset({int})
    kinds = frozenset({str, float})

    def fits(self, value: Any) -> bool:
        return (isinstance(value, int) and value.__class__ is not bool) or super().fits(value)


class _Choice(Shape):
    """One of a few values: a Literal's, or an Enum's."""

    def __init__(self, choices: Mapping[Any, Any], *, is_built: bool) -> None:
        super().__init__("one of " + ", ".join(map(_shown_choice, choices)))
        # With the class, since True == 1 == 1.0 to Python and not to JSON.
        self._choices = {(value.__class__, value): built for value, built in choices.items()}
        self._classes = frozenset(value.__class__ for value in choices)
        self.kinds = frozenset(float if kind is int else kind for kind in self._classes)
        self.is_built = is_built

    def fits(self, value: Any) -> bool:
        return value.__class__ in self._classes and (value.__class__, value) in self._choices

    def build(self, value: Any) -> Any:
        return self._choices[value.__class__, value]


class _List(Shape):
    kinds = frozenset({list})

    def __init__(self, item: Shape) -> None:
        super().__init__("a list")
        self._item = item
        self._takes_any = isinstance(item, _Anything)
        self.is_built = item.is_built

    def fits(self, value: Any) -> bool:
        if not isinstance(value, (list, tuple)):
            return False
        if self._takes_any:
            return True
        classes, fits = self._item.classes, self._item.fits
        for item in value:  # noqa: SIM110 - all() of a generator costs as much again
            if item.__class__ not in classes and not fits(item):
                return False
        return True

    def explain_inside(self, json: Any, value: Any, path: str, misfits: list[Misfit]) -> None:
        if not isinstance(json, (list, tuple)):
            super().explain_inside(json, value, path, misfits)
            return
        for place, item in enumerate(json):
            self._item.explain(item, f"{path}[{place}]", misfits)

    def build(self, value: Any) -> Any:
        return [self._item.build(item) for item in value] if self.is_built else value


class _Tuple(Shape):
    """A list; of any length with one kind of item, or with a kind for each place."""

    kinds = frozenset({list})
    is_built = True

    def __init__(self, items: Sequence[Shape], repeated: Shape | None) -> None:
        super().__init__("a list" if repeated else f"a list of {len(items)}")
        self._items = items
        self._repeated = repeated

    def fits(self, value: Any) -> bool:
        nodes = self._nodes(value)
        return nodes is not None and all(node.fits(item) for node, item in zip(nodes, value, strict=True))

    def explain_inside(self, json: Any, value: Any, path: str, misfits: list[Misfit]) -> None:
        nodes = self._nodes(json)
        if nodes is None:
            super().explain_inside(json, value, path, misfits)
            return
        for place, (node, item) in enumerate(zip(nodes, json, strict=True)):
            node.explain(item, f"{path}[{place}]", misfits)

    def build(self, value: Any) -> Any:
        return tuple(node.build(item) for node, item in zip(self._nodes(value) or (), value, strict=True))

    def _nodes(self, value: Any) -> Sequence[Shape] | None:
        if not isinstance(value, (list, tuple)):
            return None
        if self._repeated is not None:
            return [self._repeated] * len(value)
        return self._items if len(self._items) == len(value) else None


class _Map(Shape):
    """An object whose names nobody knows beforehand."""

    kinds = frozenset({dict})

    def __init__(self, item: Shape) -> None:
        super().__init__("an object")
        self._item = item
        self.is_built = item.is_built

    def fits(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        classes, fits = self._item.classes, self._item.fits
        for name, item in value.items():
            if not isinstance(name, str) or (item.__class__ not in classes and not fits(item)):
                return False
        return True

    def explain_inside(self, json: Any, value: Any, path: str, misfits: list[Misfit]) -> None:
        if not isinstance(json, dict):
            super().explain_inside(json, value, path, misfits)
            return
        for name, item in json.items():
            if isinstance(name, str):
                self._item.explain(item, inner_path(path, name), misfits)
            else:
                misfits.append(Misfit(inner_path(path, str(name)), "expected text as the name", shown(name)))

    def build(self, value: Any) -> Any:
        return {name: self._item.build(item) for name, item in value.items()} if self.is_built else value


class _Field(NamedTuple):
    name: str
    node: Shape
    is_required: bool
    is_argument: bool


class _Object(Shape):
    """A dataclass or a TypedDict. Its fields are put in later, since it may have fields of its own class."""

    kinds = frozenset({dict})

    def __init__(self, schema: type) -> None:
        super().__init__(f"an object ({schema.__name__})")
        self._schema = schema
        self._fields: Sequence[_Field] = ()
        self._checks: Sequence[tuple[str, frozenset[type], Callable[[Any], bool]]] = ()
        self.is_built = True  # until the fields are known, so that lists of the own class are built

    def complete(self, fields: Sequence[_Field]) -> None:
        """Put the fields in."""
        self._fields = fields
        self._checks = [
            (name, node.classes if is_required else node.classes | {_Absent}, node.fits)
            for name, node, is_required, _ in fields
        ]
        self.is_built = dataclasses.is_dataclass(self._schema) or any(
            field.node.is_built for field in fields if field.node is not self
        )

    def fits(self, value: Any) -> bool:
        """The hot path of every check: a look-up and a comparison for each field that is what it should be."""
        if not isinstance(value, dict):
            return False
        look_up = value.get
        for name, classes, fits in self._checks:
            item = look_up(name, _ABSENT)
            if item.__class__ not in classes and not fits(item):
                return False
        return True

    def explain_inside(self, json: Any, value: Any, path: str, misfits: list[Misfit]) -> None:
        if not isinstance(json, dict):
            super().explain_inside(json, value, path, misfits)
            return
        for name, node, is_required, _ in self._fields:
            if name in json:
                node.explain(json[name], inner_path(path, name), misfits)
            elif is_required:
                misfits.append(Misfit(inner_path(path, name), f"missing, expected {node.expected}", ""))

    def build(self, value: Any) -> Any:
        if not dataclasses.is_dataclass(self._schema):
            return self._build_dict(value)
        arguments = {
            name: node.build(value[name]) if node.is_built else value[name]
            for name, node, _, is_argument in self._fields
            if is_argument and name in value
        }
        try:
            return self._schema(**arguments)
        except (ValueError, TypeError, AssertionError) as error:
            raise RefusedError(self._schema.__name__, str(error) or repr(error)) from error

    def _build_dict(self, value: Any) -> Any:
        built = dict(value)
        for name, node, _, _ in self._fields:
            if node.is_built and name in built:
                built[name] = node.build(built[name])
        return built


class _Union(Shape):
    """One of several; the first that fits counts."""

    def __init__(self, members: Sequence[Shape]) -> None:
        super().__init__(" or ".join(dict.fromkeys(member.expected for member in members)))
        self._members = members
        self.classes = frozenset[type]().union(*(member.classes for member in members))
        self.kinds = frozenset[type]().union(*(member.kinds for member in members))
        self.is_built = any(member.is_built for member in members)
        self._fits = [member.fits for member in members]

    def fits(self, value: Any) -> bool:
        return value.__class__ in self.classes or any(fits(value) for fits in self._fits)

    def explain_inside(self, json: Any, value: Any, path: str, misfits: list[Misfit]) -> None:
        """Where only one member has this JSON type, it was meant: its own words lead to the very field."""
        candidates = [member for member in self._members if _kind(json) in member.kinds]
        found: list[list[Misfit]] = []
        for member in candidates:
            found.append([])
            member.explain(json, path, found[-1])
            if not found[-1]:
                return
        if len(candidates) == 1 and _kind(json) in {dict, list}:
            misfits += found[0]
        else:
            super().explain_inside(json, value, path, misfits)

    def build(self, value: Any) -> Any:
        for member in self._members:
            if value.__class__ in member.classes or member.fits(value):
                return member.build(value)
        return value


def _kind(json: Any) -> type:
    return float if json.__class__ is int else type(json)


def _as_json(value: Any) -> Any:
    """What will stand in the JSON for a value: numpy's numbers, dates, tuples; the value itself where nothing can."""
    if value.__class__ in JSON_CLASSES and (value.__class__ is not float or value - value == 0):
        return value
    if isinstance(value, (dict, list, tuple)):  # item by item, so that the bad one is found
        return value
    try:
        return loads(encode(value))
    except BadRowError:
        return value


def inner_path(path: str, name: str) -> str:
    """The path of a field inside of what is at ``path``."""
    if not name.isidentifier():
        return f"{path}[{name!r}]"
    return f"{path}.{name}" if path else name


def shown(value: Any) -> str:
    """A value as messages show it."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = repr(value[: 2 * _SHOWN_CHARACTERS] if isinstance(value, (str, bytes)) else value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + '…'}"


def _shown_choice(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


# --- from types to nodes ---------------------------------------------------------------------------------------


_ANY_TEXT = r"(?s:.+)"
_SIMPLE: Mapping[Any, Callable[[], Shape]] = {
    Any: lambda: _Anything("any value"),
    object: lambda: _Anything("any value"),
    None: lambda: _Null("null"),
    types.NoneType: lambda: _Null("null"),
    str: lambda: _Text("text"),
    bool: lambda: _Bool("true or false"),
    int: lambda: _Integer("an integer"),
    float: lambda: _Number("a number"),
    list: lambda: _List(_Anything("any value")),
    abc.Sequence: lambda: _List(_Anything("any value")),
    tuple: lambda: _Tuple((), _Anything("any value")),
    dict: lambda: _Map(_Anything("any value")),
    abc.Mapping: lambda: _Map(_Anything("any value")),
    # fromisoformat takes a bare date for midnight, and UUID and Decimal take more than their standard forms.
    datetime: lambda: _Read("a date and time in ISO 8601", r".{8,10}[T ].+", datetime.fromisoformat),
    date: lambda: _Read("a date in ISO 8601", _ANY_TEXT, date.fromisoformat),
    time: lambda: _Read("a time in ISO 8601", _ANY_TEXT, time.fromisoformat),
    UUID: lambda: _Read("a UUID as text", r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", UUID),
    Decimal: lambda: _Decimal(
        "a decimal number as text, or an integer", r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,5})?", Decimal
    ),
}
_SUPPORTED = (
    "str, int, float, bool, None, Any, list, tuple, dict with text keys, Optional, Union, Literal, Enum, Decimal, "
    "datetime, date, time, UUID, dataclasses and TypedDicts; a pydantic model can say more"
)


class Compiler:
    """Turns types into nodes. ``is_judged``: whether a dataclass among them has a say of its own in what fits."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self._objects: dict[type, _Object] = {}
        self.is_judged = False

    def compile(self, hint: Any, where: str) -> Shape:
        """The node of a type.

        Raises:
            ConfigError: no JSON value has this type; ``where`` names the field.
        """
        try:
            simple = _SIMPLE.get(hint)
        except TypeError:  # not hashable, so none of them
            simple = None
        if simple is not None:
            return simple()
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is not None:
            return self._generic(hint, origin, arguments, where)
        if isinstance(hint, type):
            return self._class(hint, where)
        if isinstance(hint, typing.NewType):
            return self.compile(hint.__supertype__, where)
        if type(hint).__name__ == "TypeAliasType":  # ``type X = …`` of Python 3.12
            return self.compile(hint.__value__, where)
        raise self._unknown(hint, where)

    def _class(self, schema: type, where: str) -> Shape:
        if schema in self._objects:
            return self._objects[schema]
        if issubclass(schema, Enum):
            choices = {member.value: member for member in schema.__members__.values()}
            return self._choice(choices, schema, where, is_built=True)
        if dataclasses.is_dataclass(schema) or is_typed_dict(schema):
            node = self._objects[schema] = _Object(schema)
            dataclass_like = dataclasses.is_dataclass(schema)
            node.complete(self._fields(schema) if dataclass_like else self._keys(schema))
            return node
        raise self._unknown(schema, where)

    def _fields(self, schema: Any) -> list[_Field]:
        self.is_judged = self.is_judged or hasattr(schema, "__post_init__")
        hints = self._hints(schema)
        fields = []
        for field in dataclasses.fields(schema):
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            node = self.compile(hints[field.name], f"{schema.__name__}.{field.name}")
            fields.append(_Field(field.name, node, field.init and not has_default, field.init))
        return fields

    def _keys(self, schema: Any) -> list[_Field]:
        return [
            _Field(name, self.compile(hint, f"{schema.__name__}.{name}"), _is_required(schema, name, hint), True)
            for name, hint in self._hints(schema).items()
        ]

    def _hints(self, schema: type) -> dict[str, Any]:
        try:
            return typing.get_type_hints(schema, include_extras=True)
        except (NameError, TypeError, SyntaxError, AttributeError) as error:
            remedy = f"its types cannot be resolved ({error}); define it, and the classes it names, in a module's body"
            raise ConfigError(self._setting, schema, remedy) from None

    def _generic(self, hint: Any, origin: Any, arguments: tuple[Any, ...], where: str) -> Shape:
        if origin in {typing.Union, types.UnionType}:
            return _Union([self.compile(argument, where) for argument in arguments])
        if origin is Literal:
            return self._choice({value: value for value in arguments}, hint, where, is_built=False)
        if origin is typing.Annotated:
            return self._annotated(hint, arguments, where)
        if origin in {typing.Required, typing.NotRequired, typing.Final}:
            return self.compile(arguments[0], where)
        return self._container(hint, origin, arguments, where)

    def _container(self, hint: Any, origin: Any, arguments: tuple[Any, ...], where: str) -> Shape:
        if origin in {list, abc.Sequence}:
            return _List(self.compile(arguments[0], where))
        if origin is tuple:
            return self._tuple(arguments, where)
        if origin in {dict, abc.Mapping} and arguments[0] is str:
            return _Map(self.compile(arguments[1], where))
        raise self._unknown(hint, where)

    def _annotated(self, hint: Any, arguments: tuple[Any, ...], where: str) -> Shape:
        for note in arguments[1:]:
            if type(note).__module__.partition(".")[0] in {"annotated_types", "pydantic"}:
                remedy = f"{where}: limits beside a type are not checked here; use a pydantic model, or __post_init__"
                raise ConfigError(self._setting, hint, remedy)
        return self.compile(arguments[0], where)

    def _tuple(self, arguments: tuple[Any, ...], where: str) -> Shape:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _Tuple((), self.compile(arguments[0], where))
        return _Tuple([self.compile(argument, where) for argument in arguments if argument != ()], None)

    def _choice(self, choices: Mapping[Any, Any], hint: Any, where: str, *, is_built: bool) -> Shape:
        plain = {value.value if isinstance(value, Enum) else value: built for value, built in choices.items()}
        if not plain or any(value.__class__ not in {str, int, bool, type(None)} for value in plain):
            raise self._unknown(hint, where)
        return _Choice(plain, is_built=is_built)

    def _unknown(self, hint: Any, where: str) -> ConfigError:
        return ConfigError(self._setting, hint, f"{where} has a type that is not checked here; use {_SUPPORTED}")


def is_typed_dict(schema: Any) -> TypeGuard[type]:
    """Whether it is a TypedDict of ``typing`` or of ``typing_extensions``, which does not know of each other's."""
    return isinstance(schema, type) and issubclass(schema, dict) and hasattr(schema, "__required_keys__")


def _is_required(schema: Any, name: str, hint: Any) -> bool:
    """Of a TypedDict's key. Where annotations are text, Python's own list of required keys overlooks NotRequired."""
    qualifier = typing.get_origin(hint)
    if qualifier is typing.Required or qualifier is typing.NotRequired:
        return qualifier is typing.Required
    return name in schema.__required_keys__
