"""Routing: which path of stages a row takes, and the way along it.

A :class:`Router` asks, in this order: its rules, first match wins; its analyser; its adaptive choice among candidates;
its default. A row for which all of these have no answer fails as ``no_route``. The stages of a path are stages like
others, each with its own policies; what fails in one of them fails the row and keeps that stage's name.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias, cast

from ..state.clock import Clock, SystemClock
from ..state.errors import ConfigError
from ..state.model import Row
from .chain import attempt
from .context import RowContext
from .errors import StageFailedError, StopExecution, UnroutedError
from .options import check_count, check_name, check_rate, check_seconds
from .outcomes import Failure
from .registry import Registry, run_component
from .stage import Handler, Stage, is_async, make_stage, takes_context

Step: TypeAlias = "str | Handler | Stage"
"""One step of a path: a type of the registry, a handler, or a finished Stage."""

Target: TypeAlias = "Step | Sequence[Step]"
"""Where a rule leads: the name of a path defined before, one step, or several in order."""

ComponentConfig: TypeAlias = "Mapping[str, Mapping[str, Any]] | Callable[[Row], Mapping[str, Mapping[str, Any]]]"
"""Configs by component type, or a function that gives them for a row (as the row comes to the component)."""

_MOST_NAMES = 256
_OTHERS = "(others)"
_NAME_CHARS = 200
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class Route:
    """Where a row goes.

    Attributes:
        name: the path's name; of a path that has none, its stages' names joined by ``>``.
        path: the names of its stages in order; for a topic, ``topic:<name>`` comes last.
        why: ``rule 'x'``, ``analysis``, ``measured: …`` or ``default``.
    """

    name: str
    path: tuple[str, ...]
    why: str


# --- figures -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PathStatistics:
    """What became of the rows that took a path, or of the events of a type.

    Attributes:
        rows: that came back, failed ones included.
        failed: of these, those that failed.
        dropped: of these, those without a result.
        seconds: spent in all of them together.
        slowest_seconds: spent in the slowest.
    """

    rows: int = 0
    failed: int = 0
    dropped: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0

    def count(self, seconds: float, *, failed: bool = False, dropped: bool = False) -> None:
        """Add a row."""
        self.rows += 1
        self.failed += failed
        self.dropped += dropped
        self.seconds += seconds
        self.slowest_seconds = max(self.slowest_seconds, seconds)

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, with ``mean_seconds``."""
        return {**asdict(self), "mean_seconds": self.seconds / self.rows if self.rows else 0.0}


class StatisticsByName:
    """Statistics of at most ``most`` names; later names are counted together as ``(others)``."""

    def __init__(self, most: int = _MOST_NAMES) -> None:
        self._most = most
        self._by_name: dict[str, PathStatistics] = {}

    def of(self, name: str) -> PathStatistics:
        """The statistics of a name; empty ones for a new name."""
        found = self._by_name.get(name)
        if found is None:
            if len(self._by_name) >= self._most:
                name = _OTHERS
            found = self._by_name.setdefault(name, PathStatistics())
        return found

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The figures of each name."""
        return {name: found.to_dict() for name, found in self._by_name.items()}


# --- stages inside an element ------------------------------------------------------------------------------------


async def run_stage(stage: Stage, row: Row, ctx: RowContext, where: str = "") -> Row | list[Row] | None:
    """One row through one stage inside an element, under all its policies.

    Args:
        stage: of one row per call.
        row: the row.
        ctx: the element's.
        where: said before the message of a failure, such as ``path 'fast'``.

    Raises:
        StageFailedError: the row failed there.
        StopExecution: the handler wants the session to end.
    """
    runtime = ctx.runtime
    if stage.is_policed:  # takes its slot for each call, so that a row which waits for its next one holds none
        outcome = await attempt(stage, row, ctx, runtime)
    else:
        async with runtime.slots(stage):
            outcome = await attempt(stage, row, ctx, runtime)
    if isinstance(outcome, Failure):
        if isinstance(outcome.error, StopExecution):
            raise outcome.error
        before = f"{where}: " if where else ""
        message = f"{before}stage {stage.name!r}: {outcome.kind}: {outcome.message}"
        raise StageFailedError(outcome, message) from outcome.error
    return outcome


async def run_stages(stages: Sequence[Stage], row: Row, ctx: RowContext, where: str = "") -> Row | list[Row] | None:
    """One row through stages in order. A split goes on part by part; one part's failure is the row's.

    Raises:
        StageFailedError: the row failed in one of them.
        StopExecution: a handler wants the session to end.
    """
    for position, stage in enumerate(stages):
        outcome = await run_stage(stage, row, ctx, where)
        if outcome is None:
            return None
        if isinstance(outcome, list):
            return await _run_parts(stages[position + 1 :], outcome, ctx, where)
        row = outcome
    return row


async def _run_parts(stages: Sequence[Stage], parts: list[Row], ctx: RowContext, where: str) -> list[Row] | None:
    results: list[Row] = []
    for part in parts:
        outcome = await run_stages(stages, part, ctx, where)
        results += outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
    return results or None


class Stages:
    """The stages that an element makes of handlers, registry types and finished Stages; each is made once.

    Args:
        element: the element's class name, for messages.
        registry: where types come from, or None.
        options: options of stages by name, as for ``pipeline.add``.
        config: configs of components by type.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(
        self,
        element: str,
        registry: Registry | None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        config: ComponentConfig | None = None,
    ) -> None:
        self._element = element
        self.registry = registry
        self._options = {name: dict(given) for name, given in (options or {}).items()}
        self._config = config if config is not None else {}
        self._by_name: dict[str, tuple[object, Stage]] = {}
        if not callable(self._config) and not isinstance(self._config, Mapping):
            raise ConfigError(f"{element}(config=)", config, "give configs by component type, or a function of the row")
        for name, given in self._options.items():
            check_stage_options(f"{element}(options=)[{name!r}]", given)
            if callable(self._config) and given.get("cache") is not None:
                remedy = "configs that depend on the row are not part of a cache's key; leave the cache out"
                raise ConfigError(f"{element}(options=)[{name!r}]", "cache", remedy)

    def of(self, step: Step) -> Stage:
        """The stage of a step.

        Raises:
            ConfigError: it is none, or another step has its name.
        """
        if isinstance(step, str):
            present = self._by_name.get(step)
            if present is not None and present[0] == step:
                return present[1]
        stage = self._make(step)
        if stage.batch is not None:
            raise ConfigError(
                f"{self._element}(step)", stage.name, "one row goes along a path: leave batch= and frame="
            )
        source, present_stage = self._by_name.setdefault(stage.name, (step, stage))
        if source is not step and source != step:
            remedy = "another step has this name; name one with make_stage(handler, name=…)"
            raise ConfigError(f"{self._element}(step)", stage.name, remedy)
        return present_stage

    def _make(self, step: Step) -> Stage:
        if isinstance(step, Stage):
            if step.name in self._options:
                raise ConfigError(
                    f"{self._element}(options=)", step.name, "a finished Stage brings its own options; set them there"
                )
            return step
        if isinstance(step, str):
            return self._component(step)
        if not callable(step):
            raise ConfigError(f"{self._element}(step)", step, "give a registry's type, a handler or a Stage")
        name = make_stage(step).name
        return make_stage(step, **self._options.get(name, {}))

    def _component(self, component_type: str) -> Stage:
        if self.registry is None:
            raise ConfigError(
                f"{self._element}(step)",
                component_type,
                f"no path has this name; for types give {self._element}(registry)",
            )
        options = self._options.get(component_type, {})
        timeout = options.get("timeout")
        if callable(self._config):
            handler: Handler = _ConfiguredByRow(self.registry, component_type, self._config, timeout)
        else:
            handler = self.registry.handler(component_type, self._config.get(component_type), timeout=timeout)
        return make_stage(handler, name=component_type, **options)

    def all(self) -> tuple[Stage, ...]:
        """Every stage so far, once all names are checked.

        Raises:
            ConfigError: a type is not registered, or options are given for a step that does not exist.
        """
        for name, (source, _) in self._by_name.items():
            if isinstance(source, str) and self.registry is not None:
                self.registry.check(name)
        for name in self._options:
            if name not in self._by_name and not (self.registry and name in self.registry.types):
                known = ", ".join(sorted(self._by_name)) or "none"
                raise ConfigError(f"{self._element}(options=)", name, f"no step has this name; the steps: {known}")
        return tuple(stage for _, stage in self._by_name.values())


class _ConfiguredByRow:
    """A component whose config a function gives for each row."""

    def __init__(
        self,
        registry: Registry,
        component_type: str,
        config: Callable[[Row], Mapping[str, Mapping[str, Any]]],
        timeout: float | None,
    ) -> None:
        self._registry = registry
        self._type = component_type
        self._config = config
        self._timeout = timeout

    async def __call__(self, row: Row, ctx: RowContext) -> Any:
        config = (self._config(row) or {}).get(self._type)
        return await run_component(self._registry, self._type, config, row, ctx, self._timeout)


_NOT_FOR_STEPS = {"handler", "name", "batch", "frame"}


def check_stage_options(setting: str, options: Mapping[str, Any]) -> None:
    """Refuse options that no stage inside an element has.

    Raises:
        ConfigError: naming those it may have.
    """
    known = sorted(set(inspect.signature(make_stage).parameters) - _NOT_FOR_STEPS)
    for option in options:
        if option not in known:
            raise ConfigError(setting, option, f"use {', '.join(known)}")


# --- choice by measurement ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Measure:
    """What is known of one candidate."""

    latency: float = 0.0
    failure_rate: float = 0.0
    measured: int = 0
    running: int = 0
    last_chosen: float = 0.0
    last_measured: float = 0.0


class Adaptive:
    """Chooses among paths by measured latency and failure rate.

    Each path has exponentially weighted averages of both. A path is worth ``latency + failure_rate * failure_seconds``
    seconds a row; the lowest wins. What is held against a path fades by half every ``half_life`` seconds in which
    it is not taken, so that a path which was bad gets another try; a path not measured yet is tried with one row, as
    soon as another is known. Besides, a share of the rows goes to a path drawn by lot.

    Args:
        candidates: names of paths, at least two.
        explore: share of rows, 0 to below 1, that take a path drawn by lot.
        weight: of the newest row in the averages, above 0 up to 1; at 0.1 the last twenty rows or so count. After a
            pause of ``half_life`` seconds it is at least a half.
        failure_seconds: seconds of latency that a failed row is as bad as.
        half_life: seconds.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        *,
        explore: float = 0.02,
        weight: float = 0.1,
        failure_seconds: float = 60.0,
        half_life: float = 30.0,
    ) -> None:
        if isinstance(candidates, str) or len(candidates) < 2 or len(set(candidates)) < len(candidates):
            raise ConfigError("adaptive(candidates)", candidates, "name at least two different paths")
        if isinstance(explore, bool) or not isinstance(explore, (int, float)) or not 0 <= explore < 1:
            raise ConfigError("adaptive(explore=)", explore, "give a share from 0 to below 1")
        check_rate("adaptive(weight=)", weight)
        if weight > 1:
            raise ConfigError("adaptive(weight=)", weight, "give a number above 0, up to 1")
        check_seconds("adaptive(failure_seconds=)", failure_seconds, least_is_zero=True)
        check_seconds("adaptive(half_life=)", half_life)
        self.candidates = tuple(candidates)
        self._explore = explore
        self._weight = weight
        self._failure_seconds = failure_seconds
        self._half_life = half_life
        self._measures = {name: _Measure() for name in self.candidates}

    def choose(self, clock: Clock) -> tuple[str, str]:
        """The path for the next row, and why. Changes nothing: :meth:`begin` does, for a row that really goes."""
        if self._explore and clock.random() < self._explore:
            drawn = min(int(clock.random() * len(self.candidates)), len(self.candidates) - 1)
            return self.candidates[drawn], "measured: a try"
        now = clock.monotonic()
        order = sorted(self.candidates, key=lambda name: self._rank(self._measures[name], now))
        return order[0], f"measured: best of {len(order)}"

    def _rank(self, measure: _Measure, now: float) -> tuple[int, float]:
        """Lower is better: untried paths, then measured ones by worth, then those whose first row is on its way."""
        if measure.measured:
            faded = 0.5 ** ((now - measure.last_chosen) / self._half_life)
            return 1, (measure.latency + measure.failure_rate * self._failure_seconds) * faded
        return (2, measure.running) if measure.running else (0, 0.0)

    def begin(self, name: str, now: float) -> None:
        """A row takes this path. What is held against it counts in full again until the row comes back."""
        measure = self._measures[name]
        measure.running += 1
        measure.last_chosen = now

    def end(self, name: str, now: float, seconds: float, *, failed: bool) -> None:
        """The row came back."""
        measure = self._measures[name]
        measure.running -= 1
        measure.measured += 1
        # The first rows count alike: else the very first one would stand for the path for long. And after a pause
        # the newest counts for more: what was measured long ago says little of a path that is well again.
        old = 0.5 ** ((now - measure.last_measured) / self._half_life)
        weight = max(self._weight, 1 / measure.measured, 1 - old)
        measure.last_measured = now
        measure.latency += weight * (seconds - measure.latency)
        measure.failure_rate += weight * (failed - measure.failure_rate)

    def give_up(self, name: str) -> None:
        """The row was cancelled: that says nothing of the path."""
        self._measures[name].running -= 1

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The averages by path."""
        return {
            name: {
                "latency_seconds": measure.latency,
                "failure_rate": measure.failure_rate,
                "rows": measure.measured,
                "running": measure.running,
            }
            for name, measure in self._measures.items()
        }


# --- the router --------------------------------------------------------------------------------------------------


class _Path(NamedTuple):
    name: str
    stages: tuple[Stage, ...]
    topic: str | None = None
    keep: bool = False

    def steps(self) -> tuple[str, ...]:
        names = tuple(stage.name for stage in self.stages)
        return names if self.topic is None else (*names, f"topic:{self.topic}")


class _Rule(NamedTuple):
    name: str
    holds: Callable[[Row, RowContext | None], Any]
    leads_to: _Path | Adaptive


class _Decision(NamedTuple):
    leads_to: _Path | Adaptive
    why: str


class Router:
    """An element that sends each row along one of several paths. Add it with ``pipeline.add(router, name=…)``.

    Args:
        registry: where the types in paths come from; none if paths are made of handlers only.
        options: options of the paths' stages, by stage name: ``{"json_processor": {"retry": Retry(attempts=3)}}``.
            Finished Stages bring their own.
        config: configs of components by type; or a function of the row that gives them.
        default: name of the path for rows that nothing else claims. Default: such rows fail as ``no_route``.
        cache_key: gives what a decision depends on, of (row) or (row, ctx): equal keys get the decision that the
            first one got, without asking rules and analyser again. The key must cover everything that these look at.
            None for a row means: decide anew. Default: nothing is remembered.
        cache_size: decisions kept; the one not used for longest goes first.
        report: field of the results that tells the route taken: ``{"route": …, "path": […], "why": …}``.
        clock: time and chance. Default: the worker's.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        config: ComponentConfig | None = None,
        default: str | None = None,
        cache_key: Callable[..., Any] | None = None,
        cache_size: int = 1024,
        report: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        element = type(self).__name__
        if registry is not None and not isinstance(registry, Registry):
            raise ConfigError(f"{element}(registry)", registry, "give a Registry")
        if report is not None and not isinstance(report, str):
            raise ConfigError(f"{element}(report=)", report, "give a field's name")
        check_count(f"{element}(cache_size=)", cache_size)
        self._element = element
        self._stages = Stages(element, registry, options, config)
        self._default = default
        self._cache_key = None if cache_key is None else _function("cache_key=", cache_key)
        self._cache_size = cache_size
        self._cache: OrderedDict[Any, _Decision] = OrderedDict()
        self._report_field = report
        self._clock = clock
        self._paths: dict[str, _Path] = {}
        self._analysed_paths: dict[tuple[str, ...], _Path] = {}
        self._rules: list[_Rule] = []
        self._analyser: Callable[[Row, RowContext | None], Any] | None = None
        self._requirements: dict[str, tuple[Stage, ...]] = {}
        self._adaptives: dict[str, Adaptive] = {}
        self._fallback: Adaptive | None = None
        self.statistics = StatisticsByName()
        """Rows, failures and seconds by path."""
        self.unrouted = 0
        """Rows that failed because no path was found for them, or because that could not be told."""
        self.cache_hits = 0
        """Decisions that did not have to be made again."""

    # --- building --------------------------------------------------------------------------------------------

    def path(self, name: str, *steps: Step) -> Router:
        """Define a path by name, for rules and choices to lead to; returns the router, so that calls chain.

        Args:
            name: of your choice; rules say it, statistics show it.
            steps: types of the registry, handlers or Stages, in order.

        Raises:
            ConfigError: the name is taken, or a step is none.
        """
        if not steps:
            raise ConfigError("path(steps)", steps, "give at least one step")
        return self._define(_Path(name, self._stages_of(steps)))

    def to_topic(self, name: str, topic: str, *, keep: bool = False) -> Router:
        """Define a path that leads to a topic: the row goes there together with the row's results, or not at all.

        It keeps its key and headers.

        Args:
            name: the path's name.
            topic: the topic's name.
            keep: whether the row is a result of the router as well. Default: it ends here.

        Raises:
            ConfigError: the name is taken.
        """
        if not isinstance(topic, str) or not _TOPIC.fullmatch(topic) or topic in {".", ".."}:
            raise ConfigError("to_topic(topic)", topic, "use 1 to 249 letters, digits, '.', '_' and '-'")
        return self._define(_Path(name, (), topic, keep))

    def adaptive(
        self,
        name: str,
        candidates: Sequence[str],
        *,
        explore: float = 0.02,
        weight: float = 0.1,
        failure_seconds: float = 60.0,
        half_life: float = 30.0,
    ) -> Router:
        """Define a choice by measurement among paths defined before: see :class:`Adaptive`.

        Rules may lead to it by its name. The first one is also where rows go that no rule and no analysis claims.

        Raises:
            ConfigError: the name is taken, a candidate is no path, or an option is wrong.
        """
        self._check_new(name)
        choice = Adaptive(
            candidates, explore=explore, weight=weight, failure_seconds=failure_seconds, half_life=half_life
        )
        for candidate in choice.candidates:
            if candidate not in self._paths:
                known = ", ".join(self._paths) or "none yet"
                raise ConfigError("adaptive(candidates)", candidate, f"define this path first; known: {known}")
        self._adaptives[name] = choice
        self._fallback = self._fallback or choice
        return self

    def rule(self, condition: Any, target: Target, *, name: str | None = None) -> Router:
        """Add a rule; rules are asked in the order they were added, and the first that holds wins.

        Args:
            condition: a function of (row) or (row, ctx), or a mapping of fields and the values they must equal.
            target: name of a path, a step, or several steps in order.
            name: for messages and reports. Default: the function's name, or the fields.

        Raises:
            ConfigError: the condition or the target is none, or the name is taken.
        """
        name = name if name is not None else _name_of(condition, len(self._rules) + 1)
        if any(rule.name == name for rule in self._rules):
            raise ConfigError("rule(name=)", name, "another rule has this name; give each its own")
        holds = _fields_equal(condition) if isinstance(condition, Mapping) else _function("rule(condition)", condition)
        self._rules.append(_Rule(name, holds, self._target(target)))
        self._cache.clear()
        return self

    def analyse(self, analyser: Callable[..., Any], requirements: Mapping[str, Target] | None = None) -> Router:
        """Set the analyser, which is asked when no rule holds.

        Args:
            analyser: a function of (row) or (row, ctx). It gives a list of requirements, which together make the
                path, in order and each once; or the name of a path; or nothing, if it has no answer.
            requirements: the step or steps that meet a requirement. Others are types of the registry.

        Raises:
            ConfigError: there is one already, or it is none.
        """
        if self._analyser is not None:
            raise ConfigError("analyse(analyser)", analyser, "the router has one already; combine them in one function")
        self._analyser = _function("analyse(analyser)", analyser)
        for requirement, target in (requirements or {}).items():
            self._requirements[requirement] = self._stages_of(_sequence(target))
        self._cache.clear()
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of all paths; with an analyser, also those of every type it may ask for.

        Raises:
            ConfigError: a path names a type that is not registered, or ``default`` is no path.
        """
        if self._default is not None:
            self._default_path(self._default)
        if self._analyser is not None and self._stages.registry is not None:
            for component_type in self._stages.registry.types:
                self._stages.of(component_type)
        return self._stages.all()

    def _define(self, path: _Path) -> Router:
        self._check_new(path.name)
        self._paths[path.name] = path
        return self

    def _check_new(self, name: str) -> None:
        check_name("path(name)", name)
        if name in self._paths or name in self._adaptives:
            raise ConfigError("path(name)", name, "another path has this name; give each its own")

    def _stages_of(self, steps: Iterable[Step]) -> tuple[Stage, ...]:
        return tuple(self._stages.of(step) for step in steps)

    def _target(self, target: Target) -> _Path | Adaptive:
        """What a rule leads to; a path without a name is named by its steps."""
        named = self._named(target)
        if named is not None:
            return named
        stages = self._stages_of(_sequence(target))
        if not stages:
            raise ConfigError("rule(target)", target, "give a path's name, or at least one step")
        return _nameless(stages)

    def _named(self, target: Any) -> _Path | Adaptive | None:
        if not isinstance(target, str):
            return None
        return self._paths.get(target) or self._adaptives.get(target)

    # --- choosing --------------------------------------------------------------------------------------------

    def choose(self, row: Row, ctx: RowContext | None = None) -> Route:
        """The route that this row would take now. Runs nothing, counts nothing.

        Raises:
            StageFailedError: a rule, the analyser or the cache's key function raised; it says which.
            UnroutedError: no route.
            ConfigError: the analyser asked for a type that is not registered.
        """
        path, why, _ = self._decide(row, ctx, self._clock or (ctx.runtime.clock if ctx else SystemClock()))
        return Route(path.name, path.steps(), why)

    def determine_optimal_path(self, row: Row) -> list[str]:
        """The names of the path's stages, as :meth:`choose` gives them."""
        return list(self.choose(row).path)

    def _decide(self, row: Row, ctx: RowContext | None, clock: Clock) -> tuple[_Path, str, Adaptive | None]:
        leads_to, why = self._remembered(row, ctx)
        if isinstance(leads_to, _Path):
            return leads_to, why, None
        name, measured = leads_to.choose(clock)
        return self._paths[name], f"{why}, {measured}" if why else measured, leads_to

    def _remembered(self, row: Row, ctx: RowContext | None) -> _Decision:
        if self._cache_key is None:
            return self._decision(row, ctx)
        key = _asked("cache_key", self._cache_key, row, ctx)
        if key is None:
            return self._decision(row, ctx)
        found = _asked("cache_key", lambda key, _: self._cache.get(key), key, ctx)  # it may give what has no hash
        if found is None:
            found = self._cache[key] = self._decision(row, ctx)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
            self.cache_hits += 1
        return cast(_Decision, found)

    def _decision(self, row: Row, ctx: RowContext | None) -> _Decision:
        for rule in self._rules:
            if _asked(f"rule {rule.name!r}", rule.holds, row, ctx):
                return _Decision(rule.leads_to, f"rule {rule.name!r}")
        if self._analyser is not None:
            path = self._analysed(_asked("analyser", self._analyser, row, ctx))
            if path is not None:
                return _Decision(path, "analysis")
        if self._fallback is not None:
            return _Decision(self._fallback, "")
        if self._default is not None:
            return _Decision(self._default_path(self._default), "default")
        raise UnroutedError("no_route", f"none of {len(self._rules)} rules holds for the row, and there is no default=")

    def _default_path(self, name: str) -> _Path | Adaptive:
        path = self._named(name)
        if path is None:
            known = ", ".join([*self._paths, *self._adaptives]) or "none"
            raise ConfigError(f"{self._element}(default=)", name, f"no path has this name; paths: {known}")
        return path

    def _analysed(self, answer: Any) -> _Path | Adaptive | None:
        """The path that an analyser's answer means."""
        named = self._named(answer)
        if named is not None or not answer:
            return named
        names = (answer,) if isinstance(answer, str) else answer
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ConfigError("analyse(analyser)", answer, "the analyser gives a list of names, a path's name, or None")
        path = self._analysed_paths.get(tuple(names))
        if path is None:
            if len(self._analysed_paths) >= _MOST_NAMES:  # they are quickly made again
                self._analysed_paths.clear()
            met = {stage.name: stage for name in names for stage in self._meeting(name)}
            path = self._analysed_paths[tuple(names)] = _nameless(tuple(met.values()))
        return path

    def _meeting(self, requirement: str) -> tuple[Stage, ...]:
        met = self._requirements.get(requirement)
        if met is not None:
            return met
        if self._stages.registry is None:
            known = ", ".join(self._requirements) or "none"
            raise ConfigError("analyse(requirements=)", requirement, f"say which steps meet it; known: {known}")
        self._stages.registry.check(requirement)  # before a stage is made: rows must not fill the memory with names
        return (self._stages.of(requirement),)

    # --- going ------------------------------------------------------------------------------------------------

    async def __call__(self, row: Row, ctx: RowContext) -> Row | list[Row] | None:
        """The row, along its path.

        Raises:
            StageFailedError: a stage of the path failed, or a rule did.
            UnroutedError: no route.
        """
        clock = self._clock or ctx.runtime.clock
        try:
            path, why, choice = self._decide(row, ctx, clock)
        except Exception:
            self.unrouted += 1
            raise
        result = await self._measured(path, choice, row, ctx, clock)
        if result is None or self._report_field is None:
            return result
        report = self._report(path, why)
        if isinstance(result, list):
            return [{**part, self._report_field: report} for part in result]
        return {**result, self._report_field: report}

    async def _measured(
        self, path: _Path, choice: Adaptive | None, row: Row, ctx: RowContext, clock: Clock
    ) -> Row | list[Row] | None:
        statistics = self.statistics.of(path.name)
        started = clock.monotonic()
        if choice is not None:
            choice.begin(path.name, started)
        try:
            result = await _go(path, row, ctx)
        except (asyncio.CancelledError, StopExecution):
            if choice is not None:
                choice.give_up(path.name)
            raise
        except BaseException:
            now = clock.monotonic()
            statistics.count(now - started, failed=True)
            if choice is not None:
                choice.end(path.name, now, now - started, failed=True)
            raise
        now = clock.monotonic()
        statistics.count(now - started, dropped=result is None)
        if choice is not None:
            choice.end(path.name, now, now - started, failed=False)
        return result

    def _report(self, path: _Path, why: str) -> dict[str, Any]:
        """What the results say of the route. No times: a replay gives the same results."""
        return {"route": path.name, "path": list(path.steps()), "why": why}

    def to_dict(self) -> dict[str, Any]:
        """Figures for status pages."""
        return {
            "paths": self.statistics.to_dict(),
            "measured": {name: choice.to_dict() for name, choice in self._adaptives.items()},
            "unrouted": self.unrouted,
            "cache_hits": self.cache_hits,
        }


async def _go(path: _Path, row: Row, ctx: RowContext) -> Row | list[Row] | None:
    if path.topic is None:
        return await run_stages(path.stages, row, ctx, f"path {path.name!r}")
    ctx.emit(path.topic, row, key=ctx.key, headers=ctx.headers)
    return row if path.keep else None


def _nameless(stages: tuple[Stage, ...]) -> _Path:
    return _Path(">".join(stage.name for stage in stages), stages)


def _sequence(target: Target) -> Sequence[Step]:
    return target if isinstance(target, (list, tuple)) else [target]  # type: ignore[list-item]  # else one Step


def _function(setting: str, function: Any) -> Callable[[Row, RowContext | None], Any]:
    """A plain function of (row) or (row, ctx) as one of both."""
    if not callable(function) or inspect.isclass(function) or is_async(function):
        raise ConfigError(setting, function, "give a plain function of (row) or (row, ctx)")
    if takes_context(function, setting):
        return function  # type: ignore[no-any-return]
    return lambda row, _: function(row)


def _fields_equal(fields: Mapping[str, Any]) -> Callable[[Row, RowContext | None], bool]:
    if not fields:
        raise ConfigError("rule(condition)", fields, "name at least one field and the value it must equal")
    wanted = dict(fields)
    return lambda row, _: all(name in row and row[name] == value for name, value in wanted.items())


def _name_of(condition: Any, number: int) -> str:
    if isinstance(condition, Mapping):
        return " and ".join(f"{name}={value!r}" for name, value in condition.items())[:_NAME_CHARS]
    own = getattr(condition, "__name__", None)
    return own if isinstance(own, str) and own != "<lambda>" else str(number)


def _asked(what: str, function: Callable[[Row, RowContext | None], Any], row: Row, ctx: RowContext | None) -> Any:
    """The function's answer; what it raises is the row's failure, and names it."""
    try:
        return function(row, ctx)
    except StopExecution:
        raise
    except Exception as error:
        failure = Failure(what, type(error).__name__, str(error) or repr(error), error=error)
        raise StageFailedError(failure, f"{what} raised {failure.kind}: {failure.message}") from error
