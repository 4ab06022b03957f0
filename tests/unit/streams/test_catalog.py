"""Which topics exist: looked up once, made where allowed, refusals remembered."""

from __future__ import annotations

import pytest
from rowmill.streams.catalog import Catalog, UnknownTopicsError
from rowmill.streams.errors import BrokerError, BrokerTimeoutError, TopicError
from support.fake_broker import FakeBroker, lost


@pytest.fixture
def broker() -> FakeBroker:
    """A broker with the topic there, of three partitions."""
    broker = FakeBroker()
    broker.make("there", 3)
    return broker


def catalog_of(
    broker: FakeBroker, *, create: bool = True, partitions: int | None = None, timeout: float = 10
) -> Catalog:
    """A catalog that knows nothing yet."""
    return Catalog(broker, create=create, partitions=partitions, timeout=timeout)


async def test_nothing_is_known_unasked(broker: FakeBroker) -> None:
    """A topic has to be looked up before its partitions can be told; afterwards the broker is not asked again."""
    catalog = catalog_of(broker)
    with pytest.raises(UnknownTopicsError) as caught:
        catalog.partitions("there")
    assert caught.value.names == {"there"}
    await catalog.ensure(caught.value.names)
    assert catalog.partitions("there") == 3
    assert broker.calls == ["topics"]


@pytest.mark.parametrize(
    ("of_catalog", "of_call", "expected"), [(None, None, 4), (7, None, 7), (7, 2, 2), (None, 2, 2)]
)
async def test_topics_are_made(broker: FakeBroker, of_catalog: int | None, of_call: int | None, expected: int) -> None:
    """A missing topic is made as wide as the call says, or the catalog, or the broker; one that exists stays."""
    catalog = catalog_of(broker, partitions=of_catalog)
    await catalog.require(["new", "there"], {"cleanup.policy": "compact"}, of_call)
    assert (catalog.partitions("new"), catalog.partitions("there")) == (expected, 3)
    assert (await broker.topics())["new"].config == {"cleanup.policy": "compact"}
    assert (await broker.topics())["there"].config == {}


async def test_creation_is_off(broker: FakeBroker) -> None:
    """Where nothing may be made, the refusal names topic, broker and remedy, and is remembered."""
    catalog = catalog_of(broker, create=False)
    with pytest.raises(TopicError, match=r"'new' does not exist on fake:// and creation is off.*--no-create-topics"):
        await catalog.require(["there", "new"])
    assert catalog.partitions("there") == 3
    with pytest.raises(TopicError):
        catalog.partitions("new")
    assert "create" not in broker.calls


@pytest.mark.parametrize("name", ["", "a b", "rowmill.control", "x" * 250, ".."])
async def test_names_that_cannot_be(broker: FakeBroker, name: str) -> None:
    """A bad name is refused without asking the broker to make it, and the other topics are looked up all the same."""
    catalog = catalog_of(broker)
    await catalog.ensure([name, "there"])
    with pytest.raises(TopicError):
        catalog.partitions(name)
    assert catalog.partitions("there") == 3
    assert "create" not in broker.calls


async def test_the_broker_refuses(broker: FakeBroker) -> None:
    """A refusal of the broker's belongs to the topic, not to the call."""
    broker.creation_allowed = False
    catalog = catalog_of(broker)
    await catalog.ensure(["new", "there"])
    with pytest.raises(TopicError, match="refused"):
        catalog.partitions("new")
    assert catalog.partitions("there") == 3


async def test_a_broker_in_trouble(broker: FakeBroker) -> None:
    """A broker that fails or does not answer is an error of the call, and nothing is remembered."""
    catalog = catalog_of(broker, timeout=0.1)
    broker.inject("topics", lost())
    with pytest.raises(BrokerError, match="connection lost"):
        await catalog.ensure(["there"])
    broker.inject("topics")
    with pytest.raises(BrokerTimeoutError, match=r"look topics up: no answer within 0\.1 s"):
        await catalog.ensure(["there"])
    with pytest.raises(UnknownTopicsError):
        catalog.partitions("there")
    await catalog.ensure(["there"])
    assert catalog.partitions("there") == 3
