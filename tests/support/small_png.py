"""Pictures for the documents: a PNG with at most 256 colours, as pages of flat colours need no more."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_small(png: bytes, path: Path) -> None:
    """Write a browser's screenshot (8 bits, RGB or RGBA) with a palette."""
    pixels = _decoded(png)
    height, width, _ = pixels.shape
    codes = pixels.reshape(-1, 3).astype(np.uint32)
    flat = (codes[:, 0] << 16) | (codes[:, 1] << 8) | codes[:, 2]
    colours, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    palette = _palette(colours, counts)
    index = _nearest(colours, palette)[inverse].astype(np.uint8).reshape(height, width)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), index], axis=1).tobytes()
    table = b"".join(struct.pack(">I", int(colour))[1:] for colour in palette)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        _chunk(b"IHDR", head),
        _chunk(b"PLTE", table),
        _chunk(b"IDAT", zlib.compress(lines, 9)),
        _chunk(b"IEND", b""),
    ]
    path.write_bytes(SIGNATURE + b"".join(parts))


def _palette(colours: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """256 colours: of each region of colours the most frequent one, so that small coloured signs stay as they are; then
    the most frequent of all."""
    order = colours[np.argsort(-counts, kind="stable")]
    regions = (order >> 20 << 8) | (order >> 12 & 15) << 4 | (order >> 4 & 15)
    _, first = np.unique(regions, return_index=True)
    chosen = order[np.sort(first)[:160]]
    return np.concatenate([chosen, order[~np.isin(order, chosen)]])[:256]


def _nearest(colours: NDArray[np.uint32], palette: NDArray[np.uint32]) -> NDArray[np.intp]:
    """The palette's index that is closest to each colour."""

    def channels(values: NDArray[np.uint32]) -> NDArray[np.int64]:
        return np.stack([(values >> 16) & 255, (values >> 8) & 255, values & 255], axis=1).astype(np.int64)

    wanted, offered = channels(colours), channels(palette)
    found = np.empty(len(wanted), np.intp)
    for start in range(0, len(wanted), 4_096):
        part = wanted[start : start + 4_096]
        found[start : start + 4_096] = ((part[:, None, :] - offered[None, :, :]) ** 2).sum(axis=2).argmin(axis=1)
    return found


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _decoded(png: bytes) -> NDArray[np.uint8]:
    assert png.startswith(SIGNATURE)
    at, packed, width, height, channels = 8, b"", 0, 0, 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", data)
            assert (depth, colour) in {(8, 2), (8, 6)}
            channels = 3 if colour == 2 else 4
        elif kind == b"IDAT":
            packed += data
        at += 12 + length
    raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    return _unfiltered(raw, channels).reshape(height, width, channels)[:, :, :3]


def _unfiltered(raw: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Undo PNG's filters, line by line."""
    lines = np.zeros((raw.shape[0], raw.shape[1] - 1), np.uint8)
    before = np.zeros(raw.shape[1] - 1, np.uint8)
    for n, line in enumerate(raw):
        kind, data = int(line[0]), line[1:]
        if kind == 0:
            now = data.copy()
        elif kind == 1:
            now = np.cumsum(data.reshape(-1, step), axis=0, dtype=np.uint64).astype(np.uint8).reshape(-1)
        elif kind == 2:
            now = data + before
        else:
            now = _by_neighbours(kind, data, before, step)
        lines[n] = before = now
    return lines


def _by_neighbours(kind: int, data: NDArray[np.uint8], before: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Filters 3 (average) and 4 (Paeth), which look to the left: byte by byte."""
    now, above, given = [0] * len(data), before.tolist(), data.tolist()
    for i, value in enumerate(given):
        left = now[i - step] if i >= step else 0
        corner = above[i - step] if i >= step else 0
        guess = (left + above[i]) // 2 if kind == 3 else _paeth(left, above[i], corner)
        now[i] = (value + guess) & 255
    return np.array(now, np.uint8)


def _paeth(left: int, above: int, corner: int) -> int:
    guess = left + above - corner
    by_left, by_above, by_corner = abs(guess - left), abs(guess - above), abs(guess - corner)
    if by_left <= by_above and by_left <= by_corner:
        return left
    return above if by_above <= by_corner else corner
