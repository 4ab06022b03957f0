"""Traces of sessions: whatever sessions there are, with names made to be mistaken for one another, each has its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from rowmill.state.codec import dumps
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.streams.known_sessions import find_sessions
from rowmill.streams.options import WorkerOptions
from rowmill.streams.session import INPUT_ROW_HEADER, SESSION_HEADER, SOURCE_HEADER, Session
from rowmill.streams.session_records import CONTROL_TOPIC, SessionRecord
from rowmill.streams.session_traces import Traces, list_traces, remove_traces
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(300)

PIPELINES = ["p", "p-a", "a", "input"]
SESSIONS = ["live", "a", "b", "input", "budget", "changelog", "dlq", "marks"]
TOPICS = ["t", "a.t", "b.t", "t.a", "a.changelog", "input.t", "p.dlq", "s"]
SINKS = ["s", "s.a", "t.b", "a.t"]


@dataclass(frozen=True)
class Made:
    """A session, as somebody started it."""

    pipeline: str
    name: str
    declared: tuple[str, ...]
    declared_sink: str
    owns_source: bool
    emits: bool
    registered: bool

    @property
    def session(self) -> Session:
        return Session(self.pipeline, self.name, owns_source=self.owns_source and self.name != "live")

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.session.source(topic) for topic in self.declared))

    @property
    def group(self) -> str:
        return f"rowmill.{self.pipeline}" + ("" if self.name == "live" else f".{self.name}")

    @property
    def own_topics(self) -> set[str]:
        """What the session made for itself, in words of the design page, not of the code that is tested."""
        suffix = "" if self.name == "live" else f".{self.name}"
        own = {f"{self.group}.budget"}
        for source in self.sources:
            own |= {f"{self.group}.{source}.changelog", f"{self.group}.{source}.answers"}
        if suffix:
            letters = f"{self.pipeline}.dlq{suffix}"
            own |= {f"{self.declared_sink}{suffix}", letters, f"rowmill.{letters}.marks"}
            own |= set(self.sources) if self.session.owns_source else set()
            own |= {f"e{suffix}"} if self.emits else set()
        return own

    @property
    def touched(self) -> set[str]:
        """All that others must leave alone for its sake."""
        letters = f"{self.pipeline}.dlq"
        shared = {self.declared_sink, letters, f"rowmill.{letters}.marks", *(["e"] if self.emits else [])}
        return self.own_topics | set(self.sources) | (shared if self.name == "live" else set())

    @property
    def groups(self) -> set[str]:
        return {self.group} if self.name == "live" else {self.group, f"{self.group}.input"}

    def record(self) -> SessionRecord:
        session = self.session
        return SessionRecord(
            group=session.group,
            pipeline=self.pipeline,
            session=self.name,
            owns_source=session.owns_source,
            sources=self.sources,
            sink=session.output(self.declared_sink),
            dead_letters=session.dead_letters,
        )


made_sessions = st.lists(
    st.builds(
        Made,
        st.sampled_from(PIPELINES),
        st.sampled_from(SESSIONS),
        st.lists(st.sampled_from(TOPICS), min_size=1, max_size=2, unique=True).map(tuple),
        st.sampled_from(SINKS),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ).filter(lambda made: made.declared_sink not in made.declared),
    min_size=2,
    max_size=6,
    unique_by=lambda made: made.group,
)


def populate(broker: FakeBroker, everybody: Sequence[Made]) -> None:
    """Everything that these sessions would have left."""
    control = broker.make(CONTROL_TOPIC)[0]
    for name in sorted(set().union(*(made.touched for made in everybody))):
        broker.make(name)
    for made in everybody:
        if made.registered:
            broker.write(control, made.record().encode(), key=made.group.encode())
        broker.group_offsets[made.group] = {TopicPartition(source, 0): Committed(1) for source in made.sources}
        if made.name != "live":
            note = (
                {"v": 1, "input": "x", "done": True} if made.session.owns_source else {"v": 1, "begin": 0, "asked": 0}
            )
            mark = Committed(1, dumps(note).decode())
            broker.group_offsets[f"{made.group}.input"] = {TopicPartition(source, 0): mark for source in made.sources}
        for source in made.sources if made.session.owns_source else ():
            tp = TopicPartition(source, 0)
            broker.log(tp).append(tp, [Outgoing(None, b"{}", 0, ((INPUT_ROW_HEADER, b"0"),))])
        context = ExecutionContext(session_id=session_uuid(made.group))
        for source in made.sources:
            changelog = TopicPartition(f"{made.group}.{source}.changelog", 0)
            record = CheckpointRecord(1, 0, True, None, {}, context.to_checkpoint(), {}, "me", "g")
            broker.write(changelog, record.encode(), key=CHECKPOINT_KEY)
        headers = ((SOURCE_HEADER, f"{made.sources[0]}/0/0/0".encode()), (SESSION_HEADER, made.name.encode()))
        outputs = {made.declared_sink if made.name == "live" else f"{made.declared_sink}.{made.name}"}
        outputs |= {"e" if made.name == "live" else f"e.{made.name}"} if made.emits else set()
        for name in outputs:
            tp = TopicPartition(name, 0)
            broker.log(tp).append(tp, [Outgoing(None, b"{}", 0, headers)])


async def found_traces(broker: FakeBroker, group: str, options: WorkerOptions) -> Traces:
    """What a session left, which is known."""
    traces = await list_traces(broker, group, options=options, clock=FakeClock())
    assert traces is not None
    return traces


@given(everybody=made_sessions)
@settings(max_examples=150)
def test_nothing_of_another_session_is_ever_listed(
    tmp_path_factory: pytest.TempPathFactory, everybody: list[Made]
) -> None:
    """No topic and no group that another session made or uses is among a session's traces; all its other ones are."""
    options = WorkerOptions(state_dir=str(tmp_path_factory.getbasetemp() / "nothing"))

    async def check() -> None:
        broker = FakeBroker(markers=False)
        populate(broker, everybody)
        for made in everybody:
            others = [other for other in everybody if other != made]
            traces = await found_traces(broker, made.group, options)
            topics = {trace.name for trace in traces.found if trace.kind == "topic"}
            groups = {trace.name for trace in traces.found if trace.kind == "group"}
            foreign = set().union(*(other.touched for other in others))
            assert not topics & foreign
            assert not groups & set().union(*(other.groups for other in others))
            assert made.group in groups
            # What only the rows in it tell of may be a twin's, and what the record tells of one's that has no record.
            twins = [other for other in others if other.name == made.name]
            unsure = {f"e.{made.name}"} if twins else set()
            if (twins and not made.registered) or not all(twin.registered for twin in twins):
                unsure.add(f"{made.declared_sink}.{made.name}")
            assert made.own_topics - foreign - unsure <= topics <= made.own_topics

    asyncio.run(check())


@given(everybody=made_sessions, data=st.data())
@settings(max_examples=60)
def test_removing_one_leaves_the_others_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, everybody: list[Made], data: st.DataObject
) -> None:
    """After a removal the other sessions are known as before, with all they had; the removed one is not."""
    made = data.draw(st.sampled_from(everybody))
    options = WorkerOptions(state_dir=str(tmp_path_factory.getbasetemp() / "nothing"))

    async def check() -> None:
        broker = FakeBroker(markers=False)
        populate(broker, everybody)
        clock = FakeClock()
        before = await find_sessions(broker, clock=clock)
        kept = {name: broker.records(name) for other in everybody if other != made for name in other.touched}
        groups = set().union(*(other.groups for other in everybody if other != made))
        offsets = {group: broker.group_offsets[group] for group in groups}
        await remove_traces(broker, await found_traces(broker, made.group, options), options=options, clock=clock)
        after = await find_sessions(broker, clock=clock)
        assert after == {group: known for group, known in before.items() if group != made.group}
        assert {name: broker.records(name) for name in kept} == kept
        assert {group: broker.group_offsets[group] for group in offsets} == offsets

    asyncio.run(check())


def test_a_file_system_has_nothing_to_do_with_it(tmp_path: Path) -> None:
    """Where no worker of this machine kept anything, no folder is listed."""

    async def check() -> None:
        broker = FakeBroker(markers=False)
        made = Made("p", "a", ("t",), "s", False, True, True)
        populate(broker, [made])
        traces = await found_traces(broker, made.group, WorkerOptions(state_dir=str(tmp_path)))
        assert {trace.kind for trace in traces.found} == {"group", "topic", "record"}

    asyncio.run(check())
