"""Routes from the look of the data: the rules and thresholds of the orchestration course that SPEC S2 and S5 follow.

Three plain functions decide; :class:`Analyser` makes them ask a row, and :class:`Assembly` is the whole of it as one
element: it chooses the path, makes the components, runs them one after the other and reports what it did.

What is looked at: ``field`` of the row where one is given (absent counts as None), else the row itself. The conditions
look at ``str(data)``, whatever it is; the requirements look at text only, so that without a ``field`` a row just asks
for ``data_validator``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..state.clock import Clock
from ..state.errors import ConfigError
from ..state.model import Row
from .registry import Registry
from .routing import ComponentConfig, Router, Target, _Path

CHUNKING, JSON, NUMERIC, VALIDATOR = "chunking_processor", "json_processor", "numeric_processor", "data_validator"
"""The component types that the analysis asks for."""

LONG_TEXT = 1000
"""Characters above which a text is to be cut into chunks."""

LARGE_DATA = 5000
"""Characters of ``str(data)`` above which data is large."""


def analyze_data_requirements(data: Any) -> list[str]:
    """The component types that this piece of data needs, in order.

    A text of more than 1,000 characters needs ``chunking_processor``; one with "json" (in any case) or "{" in it
    ``json_processor``; one with a digit ``numeric_processor``. Everything needs ``data_validator``.
    """
    requirements = []
    if isinstance(data, str):
        if len(data) > LONG_TEXT:
            requirements.append(CHUNKING)
        if "{" in data or "json" in data.lower():
            requirements.append(JSON)
        if any(map(str.isdigit, data)):
            requirements.append(NUMERIC)
    return [*requirements, VALIDATOR]


def _is_large(data: Any) -> bool:
    return len(str(data)) > LARGE_DATA


def _is_structured(data: Any) -> bool:
    if isinstance(data, dict):
        return True
    text = str(data)
    return "{" in text and "}" in text


def _is_streaming(data: Any) -> bool:
    return hasattr(data, "stream") or "stream" in str(data).lower()


CONDITIONS: Mapping[str, Callable[[Any], bool]] = {
    "large_data": _is_large,
    "structured_data": _is_structured,
    "streaming_data": _is_streaming,
}
"""The conditions by name."""


def evaluate_condition(condition: str, data: Any) -> bool:
    """Whether a condition holds for this piece of data; one that nobody knows never does.

    Args:
        condition: ``large_data`` (``str(data)`` has more than 5,000 characters), ``structured_data`` (a dict, or
            text with "{" and "}"), ``streaming_data`` (it has a ``stream``, or "stream" in its text).
        data: anything.
    """
    known = CONDITIONS.get(condition)
    return known is not None and known(data)


def determine_optimal_path(data: Any, rules: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """The component types that this piece of data should go through, in order.

    Args:
        data: anything.
        rules: paths by condition, asked in order; the first that holds wins.

    Returns:
        The rule's path; else what :func:`analyze_data_requirements` says, but for text that is both JSON and to be
        cut exactly ``json_processor``, ``chunking_processor``, ``data_validator``: cutting JSON up before it is read
        would break it. (``numeric_processor`` is left out then: so it is in the course.)
    """
    for condition, path in (rules or {}).items():
        if evaluate_condition(condition, data):
            return list(path)
    requirements = analyze_data_requirements(data)
    if JSON in requirements and CHUNKING in requirements:
        return [JSON, CHUNKING, VALIDATOR]
    return requirements


class Analyser:
    """Asks a row: for :meth:`Router.analyse <rowmill.handlers.routing.Router.analyse>`.

    Args:
        field: the field to look at; default: the whole row.
        rules: paths by condition, asked in order before the requirements.

    Raises:
        ConfigError: the field is no text, or a condition is unknown.
    """

    def __init__(self, field: str | None = None, rules: Mapping[str, Sequence[str]] | None = None) -> None:
        self._field = _checked_field(field)
        self._rules = {_checked_condition(condition): list(path) for condition, path in (rules or {}).items()}

    def __call__(self, row: Row) -> list[str]:
        """The component types for this row, in order."""
        return determine_optimal_path(row if self._field is None else row.get(self._field), self._rules)


def named_condition(name: str, field: str | None = None) -> Callable[[Row], bool]:
    """A condition as a predicate of rows: ``router.rule(named_condition("large_data"), …)``.

    Args:
        name: ``large_data``, ``structured_data`` or ``streaming_data``.
        field: the field to look at; default: the whole row, which is always ``structured_data``.

    Raises:
        ConfigError: no condition has this name.
    """
    holds = CONDITIONS[_checked_condition(name)]
    field = _checked_field(field)

    def predicate(row: Row) -> bool:
        return holds(row if field is None else row.get(field))

    predicate.__name__ = name
    return predicate


class Assembly(Router):
    """A router that assembles a path for each row: conditions, then analysis; components from the registry.

    It reports in the field ``report`` of each result: ``processing_path`` (component types in order),
    ``components_created`` (these types, each once: made for this row, or taken from the pool), ``status``
    (``completed``; a row that failed has no result but a dead letter, which names the component) and ``why``.

    Args:
        registry: where components come from.
        field: what conditions and analysis look at; default: the whole row.
        rules: paths by condition name, asked in order; more with :meth:`rule`.
        options: options of the components' stages by type (``retry``, ``timeout``, ``breaker``, …).
        config: configs by type, or a function of the row that gives them.
        report: the report's field; None for no report.
        cache_key, cache_size, clock: as for :class:`~rowmill.handlers.routing.Router`.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        field: str | None = None,
        rules: Mapping[str, Target] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        config: ComponentConfig | None = None,
        report: str | None = "orchestration",
        cache_key: Callable[..., Any] | None = None,
        cache_size: int = 1024,
        clock: Clock | None = None,
    ) -> None:
        if registry is None:
            raise ConfigError("Assembly(registry)", registry, "give a Registry with a factory for each component type")
        super().__init__(
            registry,
            options=options,
            config=config,
            cache_key=cache_key,
            cache_size=cache_size,
            report=report,
            clock=clock,
        )
        self._field = _checked_field(field)
        self.analyse(Analyser(field))
        for name, target in (rules or {}).items():
            self.rule(name, target)

    def rule(self, condition: Any, target: Target, *, name: str | None = None) -> Assembly:
        """Add a rule as at any router; a condition may also be one of the names in :data:`CONDITIONS`.

        Raises:
            ConfigError: no condition has this name; or as for a router.
        """
        if isinstance(condition, str):
            name = name if name is not None else condition
            condition = named_condition(condition, self._field)
        super().rule(condition, target, name=name)
        return self

    def add_routing_rule(self, condition: str, workflow_path: Sequence[str]) -> None:
        """The same as :meth:`rule`."""
        self.rule(condition, workflow_path)

    def _report(self, path: _Path, why: str) -> dict[str, Any]:
        names = list(path.steps())
        return {
            "processing_path": names,
            "components_created": list(dict.fromkeys(names)),
            "status": "completed",
            "why": why,
        }


def _checked_field(field: str | None) -> str | None:
    if field is not None and not isinstance(field, str):
        raise ConfigError("field", field, "give a field's name, or leave it out for the whole row")
    return field


def _checked_condition(name: str) -> str:
    if name not in CONDITIONS:
        raise ConfigError("condition", name, f"use {', '.join(CONDITIONS)}, or give a function of the row")
    return name
