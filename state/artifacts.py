"""Artifacts: values too large for a message. They lie in a store, and the row carries a reference.

An artifact is found by what it holds (the SHA-256 of its bytes), so that a row that is run again after a crash writes
the same file over again, and nothing is there twice. It is written, and safe on disk, before the row's transaction is
made: whoever reads a reference finds its artifact. The other way round it is not certain: a row that fails afterwards
leaves an artifact that nothing refers to, until :meth:`ArtifactStore.sweep` takes it away.

Stores divide into scopes, one for each session: a session that is cleaned up takes its scope with it. A reference
names its scope, and is read through any store of the same place.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar

from .codec import encode, loads
from .errors import BadRowError, ConfigError, RowmillError
from .model import Row

REFERENCE_KEY = "$artifact"
"""The key that makes a JSON object a reference."""

ARTIFACT_LIMIT = 65_536
"""Bytes above which a text is replaced by a reference, where nothing else is said."""

MAX_ARTIFACT_BYTES = 1 << 30
"""Bytes of one artifact, which is held in memory whole."""

BYTES_TYPE = "application/octet-stream"
TEXT_TYPE = "text/plain; charset=utf-8"
JSON_TYPE = "application/json"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
SHARED_SCOPE = "shared"
"""Where artifacts are put that belong to no session."""

_SCOPE = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,199}")
_NAME = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,200}")
_CONTENT_TYPE = re.compile(r"[\w.+-]{1,60}/[\w.+-]{1,60}( ?; ?[\w.+-]{1,40}=[\w.+\"-]{1,40}){0,4}", re.ASCII)


class ArtifactError(RowmillError):
    """No artifact is behind a reference, it is not what was stored, or it is no reference: the row fails."""

    kind: ClassVar[str] = "artifact"


class ArtifactStoreError(ArtifactError):
    """The place of the artifacts cannot be read or written now (disk full, no access): the operator, then retry."""

    retryable: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """What a row carries in place of a large value.

    Attributes:
        digest: ``sha256:`` and 64 hexadecimal digits.
        size: bytes.
        content_type: a MIME type.
        name: for people, such as a file's name; "" for none. It is no part of any path.
        store: the scope that it was put into.
    """

    digest: str
    size: int
    content_type: str = BYTES_TYPE
    name: str = ""
    store: str = SHARED_SCOPE

    def to_row(self) -> Row:
        """The reference as JSON: ``{"$artifact": "sha256:…", "bytes": 7, "type": "image/png", …}``."""
        row: Row = {REFERENCE_KEY: self.digest, "bytes": self.size, "type": self.content_type, "store": self.store}
        if self.name:
            row["name"] = self.name
        return row

    @classmethod
    def from_row(cls, value: Any) -> ArtifactRef:
        """Read a reference. It came with a row, so that nothing in it is believed before it was looked at.

        Raises:
            ArtifactError: it is none, or a part of it is not as rowmill writes it.
        """
        if isinstance(value, ArtifactRef):
            return value
        if not is_reference(value):
            raise ArtifactError(f"expected a reference to an artifact ({{'{REFERENCE_KEY}': …}}), got {_shown(value)}")
        digest, size, content_type = value[REFERENCE_KEY], value.get("bytes"), value.get("type", BYTES_TYPE)
        name, store = value.get("name", ""), value.get("store", SHARED_SCOPE)
        _check_part(REFERENCE_KEY, digest, _DIGEST)
        _check_part("type", content_type, _CONTENT_TYPE)
        _check_part("name", name, _NAME)
        _check_part("store", store, _SCOPE)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ArtifactError(f"the reference's 'bytes' is {_shown(size)}; expected a number of bytes")
        return cls(digest, size, content_type, name, store)


def is_reference(value: Any) -> bool:
    """Whether a JSON value stands for an artifact."""
    return isinstance(value, dict) and REFERENCE_KEY in value


def references(value: Any) -> Iterator[ArtifactRef]:
    """Every reference in a row, at any depth; what only looks like one is left out."""
    if is_reference(value):
        with contextlib.suppress(ArtifactError):
            yield ArtifactRef.from_row(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


# --- the port --------------------------------------------------------------------------------------------------


class ArtifactStore(ABC):
    """A place for artifacts, found by what they hold. Methods block, and may be called from several threads at once.

    A port for other places than folders need give no order of any kind; what it must give: after :meth:`put` has
    returned, the artifact outlives a crash of the machine, and no reader ever sees a part of one.

    Args:
        scope: where this store puts: a session's group, or ``shared``. Letters, digits, ``.``, ``_``, ``-``.
        max_bytes: of one artifact.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(self, scope: str = SHARED_SCOPE, max_bytes: int = MAX_ARTIFACT_BYTES) -> None:
        if not isinstance(scope, str) or not _SCOPE.fullmatch(scope):
            raise ConfigError("artifacts(scope=)", scope, "use 1 to 200 letters, digits, '.', '_', '-', no '.' first")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ConfigError("artifacts(max_bytes=)", max_bytes, "give a number of bytes from 1")
        self.scope = scope
        self.max_bytes = max_bytes

    def put(self, data: bytes, *, name: str = "", content_type: str = BYTES_TYPE) -> ArtifactRef:
        """Keep ``data``. Putting the same again gives the same reference, and makes it young for :meth:`sweep`.

        Args:
            data: at most ``max_bytes``.
            name: for people; 200 characters at most, none of them a control character.
            content_type: a MIME type.

        Raises:
            ArtifactStoreError: it cannot be written; nothing is kept.
            ArtifactError: it is too large.
            ConfigError: the name or the type is none.
        """
        if not isinstance(data, bytes):
            raise ConfigError("artifact(data)", type(data).__name__, "give bytes")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError("artifact(name=)", name, "use up to 200 characters, none of them a control character")
        if not isinstance(content_type, str) or not _CONTENT_TYPE.fullmatch(content_type):
            raise ConfigError("artifact(type=)", content_type, "give a MIME type such as 'image/png'")
        if len(data) > self.max_bytes:
            raise ArtifactError(f"the artifact has {len(data):,} bytes, above max_bytes={self.max_bytes:,}")
        reference = ArtifactRef("sha256:" + sha256(data).hexdigest(), len(data), content_type, name, self.scope)
        self._write(reference, data)
        return reference

    def get(self, reference: ArtifactRef | Row) -> bytes:
        """The artifact's bytes, compared with the reference.

        Raises:
            ArtifactStoreError: it cannot be read now.
            ArtifactError: it is not there, it was damaged, or this is no reference.
        """
        reference = ArtifactRef.from_row(reference)
        if reference.size > self.max_bytes:
            raise ArtifactError(f"the artifact has {reference.size:,} bytes, above max_bytes={self.max_bytes:,}")
        data = self._read(reference)
        if data is None:
            raise ArtifactError(f"no artifact {_named(reference)} in {self}; it was swept or put elsewhere")
        if len(data) != reference.size or "sha256:" + sha256(data).hexdigest() != reference.digest:
            raise ArtifactError(
                f"the artifact {_named(reference)} in {self} is not the {reference.size:,} bytes that the reference "
                "tells of: it was damaged (running its row again writes it anew), or the reference is wrong"
            )
        return data

    @abstractmethod
    def within(self, scope: str) -> ArtifactStore:
        """The same place, putting into another scope."""

    @abstractmethod
    def exists(self, reference: ArtifactRef | Row) -> bool:
        """Whether something is there; whether it is undamaged, only :meth:`get` finds out."""

    @abstractmethod
    def delete(self, reference: ArtifactRef | Row) -> bool:
        """Take it away, for every row that refers to it; False if it was not there."""

    @abstractmethod
    def sweep(self, older_than: float, keep: Iterable[ArtifactRef | Row] = ()) -> int:
        """Take away what was last put longer ago, in every scope; says how many.

        Args:
            older_than: seconds from 0. Make it longer than results are kept, and than a row may take.
            keep: references that stay whatever their age, such as :func:`references` finds in rows.
        """

    @abstractmethod
    def clear(self) -> int:
        """Take away everything in this store's scope, when its session is cleaned up; says how many.

        Raises:
            ConfigError: the scope is ``shared``, so that nobody knows whose they are.
        """

    @abstractmethod
    def _write(self, reference: ArtifactRef, data: bytes) -> None: ...

    @abstractmethod
    def _read(self, reference: ArtifactRef) -> bytes | None: ...

    def _check_scoped(self) -> None:
        if self.scope == SHARED_SCOPE:
            raise ConfigError("artifacts.clear()", self.scope, "choose whose: artifacts.within('rowmill.…').clear()")


def _check_part(part: str, value: Any, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ArtifactError(f"the reference's {part!r} is {_shown(value)}, which rowmill does not write")


def _named(reference: ArtifactRef) -> str:
    return f"{reference.store}/{reference.digest}" + (f" ({reference.name})" if reference.name else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


# --- rows ------------------------------------------------------------------------------------------------------


def put_artifact(store: ArtifactStore, value: Any, *, name: str = "", content_type: str | None = None) -> Row:
    """Keep a value of any kind and give the reference to put into a row.

    Args:
        store: where.
        value: bytes as they are, text as UTF-8, anything else as JSON.
        name: for people.
        content_type: default: ``application/octet-stream``, ``text/plain; charset=utf-8`` or ``application/json``.

    Raises:
        ArtifactError: it cannot be kept.
        BadRowError: it is none of bytes, text and JSON.
        ConfigError: the name or the type is none.
    """
    data, natural = _bytes_of(value)
    return store.put(data, name=name, content_type=natural if content_type is None else content_type).to_row()


def _bytes_of(value: Any) -> tuple[bytes, str]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), BYTES_TYPE
    if isinstance(value, str):
        try:
            return value.encode("utf-8"), TEXT_TYPE
        except UnicodeEncodeError:
            raise BadRowError("unserialisable", "the text holds lone surrogates, which UTF-8 has no form for") from None
    return encode(value), JSON_TYPE


def load_artifact(store: ArtifactStore, reference: ArtifactRef | Row) -> bytes:
    """The bytes behind a reference that a row carries.

    Raises:
        ArtifactError: see :meth:`ArtifactStore.get`.
    """
    return store.get(reference)


def is_oversized(row: Any, limit: int) -> bool:
    """Whether :func:`materialize` would replace anything: cheap, and without any input or output.

    Raises:
        BadRowError: the row nests too deeply to be JSON.
    """
    try:
        return _is_oversized(row, limit)
    except RecursionError:
        raise _too_deep() from None


def materialize(row: Any, limit: int, store: ArtifactStore) -> Any:
    """The row with references in place of what is large: texts of more than ``limit`` bytes of UTF-8, and any bytes
    (JSON has no form for them), at any depth of dicts, lists and tuples.

    Lists and dicts themselves are not replaced, however large, and names are not. The row that was given is not
    changed; if there is nothing to replace, it is what comes back.

    Raises:
        ArtifactError: something could not be kept: the row fails.
        BadRowError: the row nests too deeply to be JSON.
    """
    try:
        return _replaced(row, limit, store)
    except RecursionError:
        raise _too_deep() from None


def load_artifacts(row: Any, store: ArtifactStore) -> Any:
    """The row with the values of its references back in their places: texts and JSON; others stay references.

    Raises:
        ArtifactError: see :meth:`ArtifactStore.get`.
    """
    if is_reference(row):
        return _loaded(ArtifactRef.from_row(row), row, store)
    if isinstance(row, dict):
        return {name: load_artifacts(item, store) for name, item in row.items()}
    return [load_artifacts(item, store) for item in row] if isinstance(row, (list, tuple)) else row


def _is_oversized(value: Any, limit: int) -> bool:
    if isinstance(value, str):
        return _is_large(value, limit)
    if isinstance(value, dict):
        return _any_oversized(value.values(), limit)
    if isinstance(value, (list, tuple)):
        return _any_oversized(value, limit)
    return isinstance(value, (bytes, bytearray, memoryview))


def _any_oversized(values: Iterable[Any], limit: int) -> bool:
    for value in values:
        if value.__class__ is str:
            if len(value) * 4 > limit and _is_large(value, limit):
                return True
        elif value.__class__ not in _SMALL and _is_oversized(value, limit):
            return True
    return False


_SMALL = frozenset({int, float, bool, type(None)})


def _is_large(text: str, limit: int) -> bool:
    """Compared by characters where that is enough: one has four bytes at most."""
    if len(text) * 4 <= limit:
        return False
    return len(text) > limit or (not text.isascii() and len(text.encode("utf-8", "surrogatepass")) > limit)


def _replaced(value: Any, limit: int, store: ArtifactStore) -> Any:
    if not _is_oversized(value, limit):
        return value
    if isinstance(value, dict):
        return {name: _replaced(item, limit, store) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, limit, store) for item in value]
    return put_artifact(store, value)


def _loaded(reference: ArtifactRef, row: Any, store: ArtifactStore) -> Any:
    kind = reference.content_type.partition(";")[0].strip()
    if kind != JSON_TYPE and not kind.startswith("text/"):
        return row
    data = store.get(reference)
    try:
        return loads(data) if kind == JSON_TYPE else data.decode("utf-8")
    except ValueError as error:
        raise ArtifactError(f"the artifact {_named(reference)} is no {kind}: {error}") from None


def _too_deep() -> BadRowError:
    return BadRowError("too_deep", "the result nests too deeply to be written as JSON")
