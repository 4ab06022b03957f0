"""A Faust app on rowmill's embedded broker: word counts in a table that outlives the program, without Kafka.

``python examples/faust_on_local.py`` reads five sentences and prints how often it has met each word. Run it again with
the same folder (``python examples/faust_on_local.py FOLDER``): it goes on counting where it was. With
``broker="kafka://localhost:9092"`` it is the same program on Kafka.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

import faust

SENTENCES = [
    "the mill turns",
    "the river turns the mill",
    "row by row",
    "the mill grinds row by row",
    "and the river runs",
]


async def count(folder: Path) -> dict[str, int]:
    """Send the sentences, count their words, give the table's contents."""
    app = faust.App(
        "words", broker=f"local://{folder}", datadir=folder / "faust", web_enabled=False, topic_disable_leader=True
    )
    sentences = app.topic("sentences", partitions=2, value_type=str, value_serializer="raw")
    words = app.topic("words", partitions=2, key_type=str, value_type=str)
    counts = app.Table("counts", default=int, partitions=2)
    left = sum(len(sentence.split()) for sentence in SENTENCES)
    done = asyncio.Event()

    @app.agent(sentences)
    async def split(stream):
        async for sentence in stream:
            for word in sentence.split():
                await words.send(key=word, value=word)

    @app.agent(words)
    async def add(stream):
        nonlocal left
        async for word in stream:
            counts[word] += 1
            left -= 1
            if not left:
                done.set()

    await sentences.maybe_declare()
    await words.maybe_declare()
    await app.start()
    try:
        for sentence in SENTENCES:
            await sentences.send(key=sentence, value=sentence)
        async with asyncio.timeout(30):
            await done.wait()
        return dict(counts)
    finally:
        await app.stop()


def main() -> None:
    """Count, and print."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else Path(scratch)
        for word, times in sorted(asyncio.run(count(folder)).items(), key=lambda each: (-each[1], each[0])):
            print(f"{times:3} {word}")


if __name__ == "__main__":
    main()
