"""Traces of a session: folders of this machine and of others, doubtful topics, and removals that meet trouble."""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rowmill.state.artifact_stores import FolderArtifacts
from rowmill.state.execution import Wanted
from rowmill.state.model import Committed, Outgoing, TopicPartition
from rowmill.state.rocksdb import RocksStores, forget_group, group_folders
from rowmill.state.store import StoreError
from rowmill.streams.dlq_letters import marks_topic
from rowmill.streams.errors import GroupBusyError, SessionError
from rowmill.streams.known_sessions import find_sessions
from rowmill.streams.options import WorkerOptions
from rowmill.streams.session import INPUT_ROW_HEADER, SESSION_HEADER, SOURCE_HEADER, Session
from rowmill.streams.session_records import CONTROL_TOPIC, SessionRecord
from rowmill.streams.session_traces import (
    Kept,
    Trace,
    Traces,
    is_being_removed,
    list_traces,
    owned_topics,
    remove_owned,
    remove_traces,
)
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(60)

HERE = platform.node()
GROUP = "rowmill.p.monday"
NEXT = "another partition"


def run(check: Callable[[], Awaitable[None]]) -> None:
    """On an event loop."""

    async def started() -> None:
        await check()

    asyncio.run(started())


def a_record(session: str = "monday", pipeline: str = "p", **changes: object) -> SessionRecord:
    """A side session that reads ``t``."""
    made = Session(pipeline, session)
    record = SessionRecord(
        group=made.group,
        pipeline=pipeline,
        session=session,
        sources=("t",),
        sink=made.output("s"),
        dead_letters=made.dead_letters,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def a_broker(*records: SessionRecord) -> FakeBroker:
    """A broker with these sessions, each of which committed something."""
    broker = FakeBroker(markers=False)
    control = broker.make(CONTROL_TOPIC)[0]
    broker.make("t")
    for record in records:
        broker.write(control, record.encode(), key=record.group.encode())
        broker.group_offsets[record.group] = {TopicPartition("t", 0): Committed(1)}
        broker.make(f"{record.group}.t.changelog")
        for topic in (record.sink, record.dead_letters):
            broker.make(topic)
    return broker


def emit(broker: FakeBroker, topic: str, session: str, source: str = "t") -> None:
    """A row that a session wrote."""
    headers = ((SOURCE_HEADER, f"{source}/0/0/0".encode()), (SESSION_HEADER, session.encode()))
    tp = TopicPartition(topic, 0)
    broker.log(tp).append(tp, [Outgoing(None, b"{}", 0, headers)])


async def look(broker: FakeBroker, folder: Path, group: str = GROUP) -> Traces:
    """What the session left."""
    traces = await list_traces(broker, group, options=at(folder), clock=FakeClock())
    assert traces is not None
    return traces


def at(folder: Path) -> WorkerOptions:
    """Tables in this folder."""
    return WorkerOptions(state_dir=str(folder))


def make_store(root: Path, group: str = GROUP) -> None:
    """Tables of a group."""
    stores = RocksStores(root)
    stores.open(group, TopicPartition("t", 0))
    stores.close()


def found_topics(traces: Traces) -> set[str]:
    """The topics that would go."""
    return {trace.name for trace in traces.found if trace.kind == "topic"}


def folders(traces: Traces) -> set[tuple[str, str]]:
    """The traces on disk."""
    return {(t.kind, t.name) for t in traces.found if t.kind in {"tables", "folder", "artifacts"}}


# --- folders -----------------------------------------------------------------------------------------------------


def test_tables_are_found_where_workers_keep_them(tmp_path: Path) -> None:
    """In the state folder, in that of the record if it is on this machine, and with answers kept apart; no other's."""

    async def check() -> None:
        usual, told, apart = tmp_path / "usual", tmp_path / "told", tmp_path / "usual" / "no-cache" / GROUP
        for root in (usual, told, apart):
            make_store(root)
        make_store(usual, "rowmill.p.monday-2")
        make_store(usual, "rowmill.p")
        broker = a_broker(a_record(state_dir=f"{HERE}:{told}"))
        traces = await look(broker, usual)
        assert folders(traces) == {("tables", str(usual)), ("tables", str(told)), ("folder", str(apart))}
        await remove_traces(broker, traces, options=at(usual), clock=FakeClock())
        assert not [group_folders(root, GROUP) for root in (usual, told, apart) if group_folders(root, GROUP)]
        assert not apart.exists()
        assert group_folders(usual, "rowmill.p.monday-2")
        assert group_folders(usual, "rowmill.p")

    run(check)


def test_a_session_that_keeps_its_answers_to_itself(tmp_path: Path) -> None:
    """Where the record itself names the folder of a side replay without cache, the whole folder goes, once."""

    async def check() -> None:
        apart = tmp_path / "no-cache" / GROUP
        make_store(apart)
        broker = a_broker(a_record(state_dir=f"{HERE}:{apart}"))
        traces = await look(broker, tmp_path)
        assert folders(traces) == {("folder", str(apart))}
        await remove_traces(broker, traces, options=at(tmp_path), clock=FakeClock())
        assert list((tmp_path / "no-cache").iterdir()) == []

    run(check)


def test_another_machine_is_out_of_reach(tmp_path: Path) -> None:
    """Folders that the record places elsewhere are named, and left alone, although there are some of that name here."""

    async def check() -> None:
        make_store(tmp_path / "theirs")
        record = a_record(state_dir=f"elsewhere:{tmp_path / 'theirs'}", artifacts="elsewhere:/data")
        traces = await look(a_broker(record), tmp_path / "ours")
        assert folders(traces) == set()
        assert {kept.name for kept in traces.kept if "machine" in kept.why} == {
            f"tables in elsewhere:{tmp_path / 'theirs'}",
            "artifacts in elsewhere:/data",
        }

    run(check)


def test_artifacts_go_with_their_session(tmp_path: Path) -> None:
    """A session's own artifacts go, also where its name has capitals; the live one's stay with its results."""

    async def check() -> None:
        store = FolderArtifacts(tmp_path / "artifacts")
        for group in ("rowmill.p", GROUP, "rowmill.p.Monday", "rowmill.p.monday-2"):
            store.within(group).put(b"data of " + group.encode())
        records = [a_record(name, artifacts=f"{HERE}:{store.root}") for name in ("live", "monday", "Monday")]
        broker = a_broker(*records)
        for group in (GROUP, "rowmill.p.Monday"):
            traces = await look(broker, tmp_path / "state", group)
            assert folders(traces) == {("artifacts", str(store.root))}
            await remove_traces(broker, traces, options=at(tmp_path / "state"), clock=FakeClock())
        assert sorted(path.name for path in store.root.iterdir()) == ["rowmill.p", "rowmill.p.monday-2"]
        live = await look(broker, tmp_path / "state", "rowmill.p")
        assert folders(live) == set()
        assert Kept(f"artifacts in {store.root}", "results refer to them") in live.kept

    run(check)


def test_half_deleted_tables_are_found_again(tmp_path: Path) -> None:
    """Tables whose deletion was killed midway are still found, and go with the next one."""
    make_store(tmp_path)
    (folder,) = group_folders(tmp_path, GROUP)
    shutil.copytree(folder, folder.with_name(f"{folder.name}%gone"))
    assert len(group_folders(tmp_path, GROUP)) == 2
    forget_group(tmp_path, GROUP)
    assert group_folders(tmp_path, GROUP) == []


# --- topics ------------------------------------------------------------------------------------------------------


def test_topics_that_may_be_anothers_stay(tmp_path: Path) -> None:
    """Emitted rows tell whose a topic is; an empty one, a mixed one and a twin's are left alone, and it is said why."""

    async def check() -> None:
        broker = a_broker(a_record(), a_record("live"))
        for topic in ("ours.monday", "mixed.monday", "empty.monday", "foreign.monday", "ours.monday.monday-2"):
            broker.make(topic)
        emit(broker, "ours.monday", "monday")
        emit(broker, "ours.monday.monday-2", "monday-2")
        emit(broker, "mixed.monday", "monday")
        emit(broker, "mixed.monday", "monday", source="t2")
        broker.write(TopicPartition("foreign.monday", 0), b"{}")
        traces = await look(broker, tmp_path)
        topics = {trace.name for trace in traces.found if trace.kind == "topic"}
        assert topics == {"s.monday", "p.dlq.monday", f"{GROUP}.t.changelog", "ours.monday"}
        why = {kept.name: kept.why for kept in traces.kept}
        assert set(why) == {"mixed.monday", "empty.monday", "t"}
        assert "others write" in why["mixed.monday"]
        assert "empty" in why["empty.monday"]

        twins = a_broker(a_record(), a_record(pipeline="q", sink="other.monday"))
        twins.make("ours.monday")
        emit(twins, "ours.monday", "monday")
        traces = await look(twins, tmp_path)
        assert "ours.monday" not in {trace.name for trace in traces.found}
        assert "q.monday" in {kept.name: kept.why for kept in traces.kept}["ours.monday"]

    run(check)


@pytest.mark.parametrize("foreign", [0, 1, 5_000, 5_001, 10_000, NEXT])
@pytest.mark.parametrize("what", ["emitted", "sink", "source"])
def test_a_topic_with_others_rows_stays_wherever_they_stand(tmp_path: Path, what: str, foreign: int | str) -> None:
    """Another session of the same name writes to it: one row of it saves a topic, behind ten thousand of ours, too."""

    async def check() -> None:
        name = {"emitted": "side.monday", "sink": "s.monday", "source": "t.monday"}[what]
        record = a_record(sources=("t", "t.monday"), owns_source=True)
        broker = a_broker(record, a_record(pipeline="q", sources=("t2",), sink="other.monday"))
        first, second = broker.make(name, 2)
        ours = ((SOURCE_HEADER, b"t/0/0/0"), (SESSION_HEADER, b"monday"), (INPUT_ROW_HEADER, b"7"))
        theirs = ((SOURCE_HEADER, b"t2/0/0/0"), (SESSION_HEADER, b"monday"))
        rows = [Outgoing(None, b"{}", 0, ours)] * 10_000
        broker.log(first).append(first, rows)
        assert name in found_topics(await look(broker, tmp_path)), "all of it is ours"
        broker.make(name, 2)
        if isinstance(foreign, int):
            rows.insert(foreign, Outgoing(None, b"{}", 0, theirs))
        else:
            broker.log(second).append(second, [Outgoing(None, b"{}", 0, theirs)])
        broker.log(first).append(first, rows)
        traces = await look(broker, tmp_path)
        assert name not in found_topics(traces)
        told = {kept.name: kept.why for kept in traces.kept if kept.name == name}
        assert told == {name: "others write to it as well"}
        await remove_traces(broker, traces, options=at(tmp_path), clock=FakeClock())
        assert name in await broker.topics()

    run(check)


@pytest.mark.parametrize("session", ["monday", "live"])
@pytest.mark.parametrize("letters", ["payments", "payments.monday", "q.dlq", "p.dlq.tuesday"])
def test_a_record_cannot_name_anothers_topic_as_its_dead_letters(tmp_path: Path, letters: str, session: str) -> None:
    """Anybody may write a record: where a session's dead letters are is told by its name, and only these go."""

    async def check() -> None:
        record = a_record(session, dead_letters=letters)
        broker = a_broker(record)
        broker.write(broker.make(letters)[0], b'{"n": 1}')
        own = {"p.dlq.monday", marks_topic("p.dlq.monday")} if session == "monday" else {"p.dlq"}
        for name in {*own, marks_topic(letters)}:
            broker.make(name)
        traces = await look(broker, tmp_path, record.group)
        assert not {letters, marks_topic(letters)} & found_topics(traces)
        await remove_traces(broker, traces, options=at(tmp_path), clock=FakeClock())
        left = set(await broker.topics())
        assert left >= {letters, marks_topic(letters)}
        assert left.isdisjoint(own) is (session == "monday")

    run(check)


def test_a_sink_of_two_stays(tmp_path: Path) -> None:
    """Where two pipelines' sessions of one name have one sink, neither's cleaning takes it."""

    async def check() -> None:
        broker = a_broker(a_record(), a_record(pipeline="q"))
        emit(broker, "s.monday", "monday")
        for group in (GROUP, "rowmill.q.monday"):
            traces = await look(broker, tmp_path, group)
            assert "s.monday" not in {trace.name for trace in traces.found}
            assert "has it, too" in {kept.name: kept.why for kept in traces.kept}["s.monday"]
        await remove_traces(broker, await look(broker, tmp_path), options=at(tmp_path), clock=FakeClock())
        last = await look(broker, tmp_path, "rowmill.q.monday")
        assert "s.monday" in {trace.name for trace in last.found}

    run(check)


@pytest.mark.parametrize("owns_source", [True, False])
def test_the_live_session_owns_nothing_shared(owns_source: bool) -> None:
    """Its source, sink and dead letters are never its own, whatever its record says."""
    live = Session("p", owns_source=owns_source)
    assert set(owned_topics(live, ["t"], "s")) == {
        "rowmill.p.budget",
        "rowmill.p.t.answers",
        "rowmill.p.t.changelog",
    }


def test_records_that_tell_of_another_session_are_not_believed(tmp_path: Path) -> None:
    """A record under one group's name that describes another session is left out: names decide what is deleted."""

    async def check() -> None:
        broker = a_broker(a_record("live"))
        control = TopicPartition(CONTROL_TOPIC, 0)
        broker.write(control, a_record("live").encode(), key=b"rowmill.p.monday")
        broker.write(control, replace(a_record(), pipeline="../..").encode(), key=GROUP.encode())
        assert list(await find_sessions(broker, clock=FakeClock())) == ["rowmill.p"]
        assert await list_traces(broker, GROUP, options=at(tmp_path), clock=FakeClock()) is None

    run(check)


# --- removals that meet trouble ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The changelogs and the record stay until the folder can be deleted; then the same call comes to its end."""

    async def check() -> None:
        apart = tmp_path / "no-cache" / GROUP
        make_store(apart)
        broker = a_broker(a_record())

        def fail(_: Path) -> None:
            raise OSError(13, "Permission denied")

        monkeypatch.setattr(shutil, "rmtree", fail)
        with pytest.raises(StoreError, match="Permission denied"):
            await remove_traces(broker, await look(broker, tmp_path), options=at(tmp_path), clock=FakeClock())
        monkeypatch.undo()
        traces = await look(broker, tmp_path)
        assert is_being_removed(traces.record)
        assert [trace.kind for trace in traces.found] == ["folder", "topic", "record"]
        await remove_traces(broker, traces, options=at(tmp_path), clock=FakeClock())
        assert await list_traces(broker, GROUP, options=at(tmp_path), clock=FakeClock()) is None
        assert list((tmp_path / "no-cache").iterdir()) == []

    run(check)


def test_a_session_that_was_started_meanwhile(tmp_path: Path) -> None:
    """A worker that registers while its session is being removed is noticed: the record stays, and it is said."""

    async def check() -> None:
        broker = a_broker(a_record())
        traces = await look(broker, tmp_path)
        registered = replace(a_record(), wanted=Wanted.RUN, sequence=9)

        def register(trace: Trace) -> None:
            if trace.name == "s.monday":
                broker.write(TopicPartition(CONTROL_TOPIC, 0), registered.encode(), key=GROUP.encode())

        with pytest.raises(SessionError, match=r"p\.monday was started again"):
            await remove_traces(broker, traces, options=at(tmp_path), clock=FakeClock(), told=register)
        assert (await find_sessions(broker, clock=FakeClock()))[GROUP].record == registered

    run(check)


def test_members_are_refused(tmp_path: Path) -> None:
    """A group with a member is refused, with the command that helps, and nothing is written."""

    async def check() -> None:
        broker = a_broker(a_record())
        broker._members[GROUP] = [broker.member(GROUP, ["t"])]  # as if it had joined
        traces = await look(broker, tmp_path)
        assert traces.workers == 1
        before = broker.records(CONTROL_TOPIC)
        with pytest.raises(GroupBusyError, match=r"rowmill cancel p\.monday"):
            await remove_traces(broker, traces, options=at(tmp_path), clock=FakeClock())
        assert broker.records(CONTROL_TOPIC) == before
        assert GROUP in broker.group_offsets

    run(check)


def test_zombies_are_fenced_where_there_can_be_some(tmp_path: Path) -> None:
    """On a broker whose groups drop members, every transactional id of the session is taken before its topics go."""

    async def check() -> None:
        broker = a_broker(a_record())
        broker.session_timeout = 10.0
        await remove_traces(broker, await look(broker, tmp_path), options=at(tmp_path), clock=FakeClock())
        assert broker.starts[f"{GROUP}/t/0"] == 1
        assert broker.starts[f"{GROUP}.input"] == 1
        assert not [name for name in broker.starts if name.startswith("rowmill.p/")]

    run(check)


def test_a_temporary_session_goes_in_two_calls(tmp_path: Path) -> None:
    """A session with a drawn name is removed by its names: nothing is listed, read or fenced for it."""

    async def check() -> None:
        broker = a_broker(a_record())
        make_store(tmp_path)
        broker.make("side.monday")
        calls = len(broker.calls)
        await remove_owned(
            broker, Session("p", "monday"), ["t"], "s.monday", side_topics=["side.monday"], tables=tmp_path
        )
        assert broker.calls[calls:] == []
        assert set(await broker.topics()) == {"t", CONTROL_TOPIC}
        assert await broker.groups() == []
        assert group_folders(tmp_path, GROUP) == []

    run(check)
