"""From ``file.py``, ``file.py:name`` or ``module:name`` to the Pipeline it means.

The user's code runs with its own folder first on ``sys.path``, as with ``python file.py``, so that it imports its
neighbours. Afterwards the folder moves to the end: handlers that import a neighbour later still find it, and a
neighbour called like a library does not get in rowmill's way.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from ...state.errors import ConfigError, RowmillError
from ..pipeline import Pipeline
from .parser import did_you_mean

_FORMS = "write file.py, file.py:name or module:name"
_SHOWN_FRAMES = 5


class UserCodeError(RowmillError):
    """You: the code that defines the pipeline raised an exception. The message holds the traceback through it."""


def load_pipeline(target: str) -> Pipeline:
    """The pipeline that ``target`` names.

    Raises:
        ConfigError: no such file, module or pipeline.
        UserCodeError: the user's code raised an exception.
    """
    where, name = _split(target)
    module = _load_file(target, Path(where)) if where.endswith(".py") else _import_module(target, where)
    return _pick(target, where, name, module)


def _split(target: str) -> tuple[str, str | None]:
    """The file or module, and the name if there is one."""
    if target.endswith(".py"):
        return target, None
    file, separator, name = target.rpartition(".py:")
    if separator:
        return f"{file}.py", name
    module, separator, name = target.partition(":")
    if not separator or not name or not all(part.isidentifier() for part in module.split(".")):
        file = target.rstrip(":").rstrip("/") + ".py"
        raise ConfigError("PIPELINE", target, _FORMS + (f"; did you mean {file!r}?" if Path(file).is_file() else ""))
    return module, name


def _load_file(target: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError("PIPELINE", target, _why_no_file(path))
    folder = path.resolve().parent
    # Under its own name, so that a neighbour which imports it gets this very module; unless the name is taken.
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"rowmill_pipeline_{path.stem}" if taken or not path.stem.isidentifier() else path.stem
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ConfigError("PIPELINE", target, _FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _first_on_path(folder):
        try:
            spec.loader.exec_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            del sys.modules[name]
            raise UserCodeError(_describe(target, error)) from error
    return module


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "it is a folder; name the file in it"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    files = [file.name for file in path.parent.glob("*.py")]
    suggestion = did_you_mean(path.name, files)
    return f"there is no such file{suggestion or '; give the path of a Python file that defines a Pipeline'}"


def _import_module(target: str, name: str) -> ModuleType:
    with _first_on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(
                    "PIPELINE", target, f"there is no module {error.name!r} here or installed; {_FORMS}"
                ) from error
            raise UserCodeError(_describe(target, error)) from error


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


def _pick(target: str, where: str, name: str | None, module: ModuleType) -> Pipeline:
    found = {key: value for key, value in vars(module).items() if isinstance(value, Pipeline)}
    if name is not None:
        if name in found:
            return found[name]
        if name in vars(module):
            kind = type(vars(module)[name]).__name__
            raise ConfigError("PIPELINE", target, f"{name!r} is a {kind}, no Pipeline{_listed(found)}")
        raise ConfigError("PIPELINE", target, f"{where} has no {name!r}{did_you_mean(name, found) or _listed(found)}")
    distinct = {id(pipeline): key for key, pipeline in reversed(found.items())}
    if not distinct:
        raise ConfigError(
            "PIPELINE", target, f"{where} defines no pipeline; at its top level write: {_example(Path(where))}"
        )
    if len(distinct) > 1:
        names = sorted(distinct.values())
        raise ConfigError(
            "PIPELINE", target, f"{where} has {len(names)} pipelines, {', '.join(names)}; say which: {where}:{names[0]}"
        )
    return found[next(iter(distinct.values()))]


def _listed(found: dict[str, Pipeline]) -> str:
    return f"; its pipelines are {', '.join(sorted(found))}" if found else "; it defines no pipeline"


def _example(path: Path) -> str:
    return f'{path.stem if path.stem.isidentifier() else "p"} = Pipeline("{path.stem}")'


# --- the user's exceptions -------------------------------------------------------------------------------------


def _describe(target: str, error: BaseException) -> str:
    """Where it happened, what it is, and the way there through the user's own files."""
    trace = traceback.TracebackException.from_exception(error)
    frames = _users_frames(trace.stack)
    lines = traceback.StackSummary.from_list(frames[-_SHOWN_FRAMES:]).format()
    message = str(error)
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        message = error.msg
        place = f"{error.filename}:{error.lineno}: "
        lines += list(trace.format_exception_only())[:-1]  # the line and a caret below the spot
    shown = "\n" + "".join(lines).rstrip() if lines else ""
    return f"cannot load {target}: {place}{type(error).__name__}: {message}{shown}"


def _users_frames(stack: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """Without rowmill's, the import system's and the libraries' frames; all but ours if none is left."""
    root = Path(__file__).parents[2]
    ours = [str(root / name) for name in ("streams", "handlers", "state", "__init__.py")]
    paths = sysconfig.get_paths()
    libraries = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    not_ours = [frame for frame in stack if not frame.filename.startswith((*ours, "<frozen"))]
    users = [frame for frame in not_ours if not frame.filename.startswith(tuple(libraries))]
    return users or not_ours
