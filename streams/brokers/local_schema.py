"""What the embedded broker's file looks like, and the statements that are worth a comment.

A batch's key is its partition's number times 2^42 plus the offset of its first record: one integer key, no
second index, room for 2 million partitions of 4 trillion records each. A trigger moves the partition's end
with each batch, so that the two cannot disagree.

Batches cover their log without a gap between them: the next one begins where one ends. Compaction puts few sparse
ones (see local_batch) in the place of many, which cover the same offsets, so that no search has to know of it.
"""

from __future__ import annotations

SCHEMA_VERSION = 2
SHIFT = 42

SCHEMA = """
CREATE TABLE topic (
    name TEXT PRIMARY KEY, partitions INTEGER NOT NULL, config TEXT NOT NULL
) WITHOUT ROWID;
-- One partition. Numbers are never used again, so that a reader of a deleted topic finds nothing, not another
-- topic's records. A deleted topic's partitions have no topic until their batches are swept.
CREATE TABLE log (
    id INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT, partition INTEGER NOT NULL,
    start INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0,
    latest INTEGER NOT NULL DEFAULT -1, bytes INTEGER NOT NULL DEFAULT 0,
    -- Compacted below the offset "clean"; what is there takes "clean_bytes".
    clean INTEGER NOT NULL DEFAULT 0, clean_bytes INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, partition)
);
-- count: the offsets it covers. newest: the largest timestamp in the batch. latest: the largest in the log up to
-- here, which never falls along a log, so that a search for a time can halve.
CREATE TABLE batch (
    id INTEGER PRIMARY KEY, count INTEGER NOT NULL, size INTEGER NOT NULL,
    newest INTEGER NOT NULL, latest INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE TRIGGER batch_moves_end AFTER INSERT ON batch BEGIN
    UPDATE log SET next = next + NEW.count, latest = NEW.latest, bytes = bytes + NEW.size
    WHERE id = NEW.id >> 42;
END;
CREATE TABLE committed (
    member_group TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL,
    offset INTEGER NOT NULL, metadata TEXT NOT NULL, time_ms INTEGER NOT NULL,
    PRIMARY KEY (member_group, topic, partition)
) WITHOUT ROWID;
CREATE TABLE producer (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;
"""

# From version 1, which had no compaction.
UPGRADE = """
ALTER TABLE log ADD COLUMN clean INTEGER NOT NULL DEFAULT 0;
ALTER TABLE log ADD COLUMN clean_bytes INTEGER NOT NULL DEFAULT 0;
"""

APPEND = """
INSERT INTO batch (id, count, size, newest, latest, data)
SELECT (id << 42) + next, ?, ?, ?, max(latest, ?), ? FROM log WHERE topic = ? AND partition = ?
"""
COMMIT_OFFSET = """
INSERT OR REPLACE INTO committed (member_group, topic, partition, offset, metadata, time_ms)
SELECT ?, topic, partition, ?, ?, ? FROM log WHERE topic = ? AND partition = ?
"""
# How far a read may go: sizes come before the blobs in a row, so that no blob is loaded to add them up.
REACH = """
SELECT max(id + count) FROM (
    SELECT id, count, size, sum(size) OVER (ORDER BY id) AS total FROM batch WHERE id >= ? AND id < ?
) WHERE total - size < ?
"""
# The blobs end to end in one answer: see local_batch on the price of a row. SQLite joins texts only; it counts
# their bytes and never looks inside, and the checksums would tell.
JOINED = """
SELECT CAST(group_concat(CAST(data AS TEXT), '') AS BLOB)
FROM (SELECT data FROM batch WHERE id >= ? AND id < ? ORDER BY id)
"""
# Enough to tell whether these batches are still the same: heads hold lengths and checksums.
HEADS = """
SELECT CAST(group_concat(CAST(head AS TEXT), '') AS BLOB)
FROM (SELECT substr(data, 1, ?) AS head FROM batch WHERE id >= ? AND id < ? ORDER BY id)
"""
LOGS_TO_COMPACT = """
SELECT id, partition, start, max(clean, start),
    (SELECT max(batch.id) - (log.id << 42) FROM batch WHERE batch.id >= log.id << 42 AND batch.id < (log.id + 1) << 42)
FROM log WHERE topic = ?1 AND (?2 IS NULL OR bytes - clean_bytes >= max(clean_bytes, ?2))
"""
AFTER_REWRITE = """
UPDATE log SET next = :next, latest = :latest, bytes = :bytes,
    clean_bytes = CASE WHEN clean >= :end THEN max(clean_bytes - :saved, 0) ELSE clean_bytes END
WHERE id = :log
"""
MARK_CLEAN = """
UPDATE log SET clean = max(clean, ?1), clean_bytes = (
    SELECT coalesce(sum(size), 0) FROM batch WHERE id >= log.id << 42 AND id < (log.id << 42) + max(log.clean, ?1)
) WHERE id = ?2
"""
BATCH_BEFORE = "SELECT id, count, latest FROM batch WHERE id <= ? ORDER BY id DESC LIMIT 1"
