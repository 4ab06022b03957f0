"""The built wheel, installed somewhere else, beside a user's own packages of the same names."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing of the checkout's build folders gets into it."""
    copy = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    ).stdout.split("\n")  # fmt: skip
    for file in filter(None, tracked):
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes((ROOT / file).read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(target), str(copy)],
        check=True, timeout=110, capture_output=True,
    )  # fmt: skip
    return next(target.glob("rowmill-*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Only rowmill's packages ship, with the typing marker: no tests, examples, benchmarks or top-level folders."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"rowmill", next(top for top in tops if top.endswith(".dist-info"))}
    assert "rowmill/py.typed" in names
    folders = {name.rsplit("/", 1)[0] for name in names if name.startswith("rowmill/")}
    on_disk = {
        "rowmill" if path.parent == ROOT else f"rowmill/{path.parent.relative_to(ROOT)}"
        for package in ("state", "handlers", "streams")
        for path in [*(ROOT / package).rglob("*.py"), *_files_of_pages()]
    } | {"rowmill"}
    assert folders == on_disk
    assert {f"rowmill/{path.relative_to(ROOT)}" for path in _files_of_pages()} <= set(names)


def _files_of_pages() -> list[Path]:
    """Templates, scripts, styles and licences of the console."""
    console = ROOT / "streams" / "console"
    return [path for name in ("static", "templates") for path in (console / name).rglob("*") if path.is_file()]


@pytest.mark.timeout(180)
def test_beside_a_users_own_folders(wheel: Path, tmp_path: Path) -> None:
    """In a folder with handlers/, state/ and streams/ of the user's own, both sides get what they mean."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)],
        check=True, timeout=100, capture_output=True,
    )  # fmt: skip
    work = tmp_path / "work"
    for package in ("handlers", "state", "streams"):
        (work / package).mkdir(parents=True)
        (work / package / "__init__.py").write_text(f'NAME = "the user\'s {package}"\n')
    (work / "mine.py").write_text(
        "import handlers, state, streams\n"
        "import rowmill.handlers, rowmill.state, rowmill.streams\n"
        "from rowmill import Pipeline\n"
        "p = Pipeline('mine')\n"
        "@p.stage\n"
        "def tell(row):\n"
        "    return {'names': [handlers.NAME, state.NAME, streams.NAME], 'rowmill': rowmill.handlers.__file__}\n"
    )
    (work / "in.jsonl").write_text('{"n": 1}\n')
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import sys; from rowmill.streams.cli.main import main; sys.exit(main(sys.argv[1:]))"
    finished = subprocess.run(
        [sys.executable, "-c", code, "run", "mine.py", "--input", "in.jsonl", "--output", "out.jsonl"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    written = (work / "out.jsonl").read_text()
    for package in ("handlers", "state", "streams"):
        assert f"the user's {package}" in written
    assert str(site) in written
