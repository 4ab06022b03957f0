"""Sessions and the names of everything that belongs to one: group, topics, transactional ids, headers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..state.errors import ConfigError
from ..state.model import RESERVED_PREFIX, TopicPartition

_PLAIN_NAME = re.compile(r"[a-zA-Z0-9_-]{1,80}")
_TOPIC_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")

LIVE = "live"
"""The id of a pipeline's live session."""
CONSOLE = "console"
"""No pipeline is called so: its group would be that of the web console, whose topics are ``rowmill.console.*``."""
_TAKEN = ("input", "control")
"""Ids whose group would be what another session's publisher, or its operators, are called."""

# Headers that rowmill writes; see DESIGN, "Headers, topics, names".
SOURCE_HEADER = RESERVED_PREFIX + "source"
SESSION_HEADER = RESERVED_PREFIX + "session"
INPUT_ROW_HEADER = RESERVED_PREFIX + "input.row"
"""The place of a row in the input of a bounded run, so that results can be put back in order."""
INPUT_ERROR_HEADER = RESERVED_PREFIX + "input.error"
"""Marks a piece of the input file that is no row, with the reason; its value is the piece as it stood."""


def check_name(setting: str, name: str) -> str:
    """A pipeline's, session's or stage's name.

    Raises:
        ConfigError: it has other than 1 to 80 letters, digits, ``_`` and ``-``.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ConfigError(setting, name, "use 1 to 80 letters, digits, '_' and '-' (no dots)")
    return name


def check_pipeline(setting: str, name: str) -> str:
    """A pipeline's name.

    Raises:
        ConfigError: it is no name, or that of the web console.
    """
    if check_name(setting, name) == CONSOLE:
        raise ConfigError(setting, name, "the web console works under this name; use another")
    return name


def check_new_session(setting: str, name: str) -> str:
    """The name of a session that may not exist yet.

    Raises:
        ConfigError: it is no name, or one that would be confused with something of the live session.
    """
    if check_name(setting, name) in _TAKEN:
        raise ConfigError(setting, name, f"the names {' and '.join(map(repr, _TAKEN))} are taken; use another")
    return name


def check_own_session(setting: str, name: str) -> str:
    """The name of a session that owns its topics: the live one's are everybody's.

    Raises:
        ConfigError: it is no name for a new session, or the live one's.
    """
    if name == LIVE:
        raise ConfigError(setting, name, "this is the session that reads the source topic; choose another name")
    return check_new_session(setting, name)


def check_topic(setting: str, name: str) -> str:
    """A topic's name, by Kafka's rule.

    Raises:
        ConfigError: naming the rule.
    """
    if not isinstance(name, str) or not _TOPIC_NAME.fullmatch(name) or name in {".", ".."}:
        raise ConfigError(setting, name, "use 1 to 249 letters, digits, '.', '_' and '-', and not '.' or '..'")
    if name.startswith(RESERVED_PREFIX):
        raise ConfigError(setting, name, f"topics that begin with {RESERVED_PREFIX!r} are rowmill's own")
    return name


@dataclass(frozen=True, slots=True)
class Session:
    """One execution of a pipeline: a consumer group, and whether its topics are the shared ones or its own.

    Attributes:
        pipeline: the pipeline's name.
        id: ``live``, or the name of another session.
        owns_source: whether the rows were published for this session alone (a bounded run over a file or frame).
    """

    pipeline: str
    id: str = LIVE
    owns_source: bool = False

    def __post_init__(self) -> None:
        check_pipeline("pipeline", self.pipeline)
        check_name("session", self.id)

    @property
    def is_live(self) -> bool:
        """Whether this is the pipeline's live session."""
        return self.id == LIVE

    @property
    def group(self) -> str:
        """The consumer group: ``rowmill.<pipeline>`` for the live session."""
        return f"rowmill.{self.pipeline}" + self._suffix

    @property
    def _suffix(self) -> str:
        return "" if self.is_live else f".{self.id}"

    def way_to_move(self, tp: TopicPartition, where: str) -> str:
        """What sets this session's position in one partition, for errors that end with it."""
        if self.owns_source:
            return "run the rows again as another session"
        name = "" if self.is_live else f" --session {self.id}"
        place = f"--source {tp.topic} --topic {tp.topic}:{tp.partition}"
        return f"with the workers stopped, `rowmill replay {self.pipeline} {place} {where}{name} --execute`"

    def source(self, topic: str) -> str:
        """The topic to read for a declared source."""
        return topic + self._suffix if self.owns_source else topic

    def output(self, topic: str) -> str:
        """The topic to write for a declared sink or an ``emit``: its own for every session but the live one."""
        return topic + self._suffix

    @property
    def dead_letters(self) -> str:
        """The dead-letter topic."""
        return self.output(f"{self.pipeline}.dlq")

    def changelog(self, source: str) -> str:
        """The changelog topic of one source (a topic as it is read): context and tables of its partitions."""
        return f"{self.group}.{source}.changelog"

    def answers(self, source: str) -> str:
        """The topic of shared cached answers of one source."""
        return f"{self.group}.{source}.answers"

    @property
    def budget(self) -> str:
        """The topic of the budget's ledger."""
        return f"{self.group}.budget"

    def transactional_id(self, tp: TopicPartition) -> str:
        """The producer id of one input partition: by group, so that sessions never fence each other."""
        return f"{self.group}/{tp}"

    @property
    def publisher_id(self) -> str:
        """The producer id, and the group, of whoever publishes a bounded run's rows."""
        return f"{self.group}.input"
