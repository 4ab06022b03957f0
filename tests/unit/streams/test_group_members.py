"""Who is in a group, as the adapters find it out: lock files of the embedded broker, Kafka's descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiokafka import errors as kafka_errors
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers import local_group
from rowmill.streams.brokers.base import MemberInfo
from rowmill.streams.brokers.kafka import _members
from rowmill.streams.brokers.local_group import GroupLock, Owner, owner_of, served_groups
from rowmill.streams.errors import BrokerError, GroupBusyError
from support.fake_broker import FakeBroker

# --- the embedded broker ---------------------------------------------------------------------------------------


def test_a_lock_tells_its_owner(tmp_path: Path) -> None:
    """Who serves a group and what it reads, for as long as it does; asking makes no file."""
    assert owner_of(tmp_path, "g") is None
    assert list(tmp_path.iterdir()) == []
    lock = GroupLock(tmp_path, "g", ["b", "a"])
    lock.acquire()
    owner = owner_of(tmp_path, "g")
    assert owner is not None
    assert (owner.group, owner.topics) == ("g", ("a", "b"))
    assert served_groups(tmp_path) == {"g"}
    lock.release()
    assert owner_of(tmp_path, "g") is None
    assert served_groups(tmp_path) == set()


def test_who_only_asks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking whether a group is served takes its lock for a moment: a worker that starts just then tries again."""
    really, asked = local_group._lock, iter([False, False])
    monkeypatch.setattr(local_group, "_lock", lambda handle: next(asked, True) and really(handle))
    lock = GroupLock(tmp_path, "g")
    lock.acquire()
    lock.release()
    monkeypatch.setattr(local_group, "_lock", lambda _: False)
    monkeypatch.setattr(local_group, "_PAUSE_SECONDS", 0.0)
    with pytest.raises(GroupBusyError, match="is served by process"):
        lock.acquire()


def test_a_lock_of_an_older_rowmill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say what it reads."""
    file = local_group._file_of(tmp_path, "g")
    file.parent.mkdir()
    file.write_bytes(b'{"group": "g", "pid": 12}')
    monkeypatch.setattr(local_group, "_lock", lambda _: False)
    assert owner_of(tmp_path, "g") == Owner("g", 12, ())


# --- Kafka -----------------------------------------------------------------------------------------------------


def described(code: int = 0, kind: str = "consumer", members: Any = ()) -> tuple[Any, ...]:
    """A group as DescribeGroups has it."""
    return (code, "g", "Stable", kind, "range", list(members))


def assignment(*tps: tuple[str, list[int]]) -> bytes:
    """A member's share, as its leader wrote it."""
    return bytes(ConsumerProtocolMemberAssignment(0, list(tps), b"").encode())


def test_members_of_a_kafka_group() -> None:
    """In order of their ids, with what they were assigned; nothing while the leader shares out."""
    told = described(
        members=[
            ("m2", "rowmill", "/10.0.0.2", b"", b""),
            ("m1", "rowmill", "/10.0.0.1", b"", assignment(("t", [0, 2]), ("u", [1]))),
        ]
    )
    tps = frozenset({TopicPartition("t", 0), TopicPartition("t", 2), TopicPartition("u", 1)})
    assert _members(told) == [
        MemberInfo("m1", "rowmill", "10.0.0.1", tps),
        MemberInfo("m2", "rowmill", "10.0.0.2", frozenset()),
    ]


def test_an_unknown_kafka_group_has_no_members() -> None:
    """Older brokers call it dead, newer ones say that there is none; neither is an error."""
    assert _members(described(kind="")) == []
    assert _members(described(kafka_errors.GroupIdNotFound.errno)) == []


def test_an_error_is_never_an_empty_group() -> None:
    """A coordinator that still loads, missing rights, an assignment of garbage: raised, not read as nobody."""
    with pytest.raises(kafka_errors.GroupLoadInProgressError):
        _members(described(kafka_errors.GroupLoadInProgressError.errno))
    with pytest.raises(kafka_errors.GroupAuthorizationFailedError):
        _members(described(kafka_errors.GroupAuthorizationFailedError.errno))
    with pytest.raises(BrokerError, match="cannot be read"):
        _members(described(members=[("m1", "c", "/h", b"", b"\x00\x00\x00\x00\x00\x09")]))


async def test_a_broker_that_cannot_tell_says_so() -> None:
    """The port's default is an error, not an empty list."""
    broker = FakeBroker()
    with pytest.raises(BrokerError, match="does not tell who is in group 'g'"):
        await super(FakeBroker, broker).members("g")
