"""What is published: the wheel and the sdist, installed into an empty environment and used from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from live.servers import Server, eventually, free_port, process

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    """The output of a command; fails with all of it if the command does."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=plain, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bin folder of an empty environment with the wheel, all extras and uvicorn; takes the name of a program."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    install = ("-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(folder / "bin" / "python", *install, f"{built[0]}[all]", "uvicorn", "pytest", "httpx2", cwd=folder)
    return lambda program: folder / "bin" / program


def test_the_distributions_pass_the_checks_of_the_index(built: tuple[Path, Path], tmp_path: Path) -> None:
    """twine finds no mistake in the metadata, and check-wheel-contents none in the wheel."""
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=tmp_path)
    run(sys.executable, "-m", "check_wheel_contents", "--config", ROOT / "pyproject.toml", built[0], cwd=tmp_path)


def test_the_wheel_has_its_data_and_nothing_of_the_checkout(built: tuple[Path, Path]) -> None:
    """Types, dashboards, rules, runbooks and templates are inside; tests, examples and docs are not."""
    names = set(zipfile.ZipFile(built[0]).namelist())
    tracked = run("git", "ls-files", "middleware", "dashboards", cwd=ROOT).split()
    package = {name.removeprefix("middleware/") for name in tracked if name.startswith("middleware/")}
    shipped = {
        name.replace("dashboards/", "aftertask/_dashboards/", 1)
        for name in tracked
        if name.startswith("dashboards/") and not name.startswith("dashboards/generate/")
    }
    assert "aftertask/py.typed" in package
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == package | shipped


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A distributor that builds from the sdist gets the same files with the same content."""
    shutil.unpack_archive(built[1], tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=source)
    (again,) = (tmp_path / "again").glob("*.whl")

    def content(wheel: Path) -> dict[str, int]:
        return {each.filename: each.CRC for each in zipfile.ZipFile(wheel).infolist()}

    assert content(again) == content(built[0])


def test_the_quickstart_runs_from_the_wheel(installed: Callable[[str], Path], tmp_path: Path) -> None:
    """In an empty folder, with nothing of the checkout on the path."""
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    port, log = free_port(), tmp_path / "log"
    command = [str(installed("uvicorn")), "quickstart:app", "--app-dir", str(tmp_path), "--port", str(port)]
    with process(*command, log=log, env={"PYTHONPATH": ""}) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/metrics"), seconds=60, what="uvicorn answering")
        httpx2.post(f"{server.url}/signup", params={"email": "ada@example.org"}, timeout=30)
        eventually(lambda: "task.skipped" in log.read_text(), what="the tasks' lines")
        line = next(line for line in log.read_text().splitlines() if "task.failed" in line)
        assert json.loads(line)["task"] == "quickstart.send_welcome_mail"
        assert 'outcome="failed",task="quickstart.send_welcome_mail"} 1.0' in httpx2.get(f"{server.url}/metrics").text


def test_the_command_exports_what_the_wheel_brings(installed: Callable[[str], Path], tmp_path: Path) -> None:
    """Dashboards, rules and runbooks come from the package, not from the checkout."""
    run(installed("aftertask"), "dashboards", "export", tmp_path / "dashboards", cwd=tmp_path)
    run(installed("aftertask"), "rules", "export", tmp_path / "rules", "--all", cwd=tmp_path)
    assert len(list((tmp_path / "dashboards").glob("*.json"))) == 4
    assert {path.suffix for path in (tmp_path / "rules").rglob("*.*")} == {".yml", ".md"}


def test_the_pytest_plugin_is_found(installed: Callable[[str], Path], tmp_path: Path) -> None:
    """The fixtures are there without an import."""
    (tmp_path / "test_it.py").write_text("def test_it(aftertask_events):\n    assert aftertask_events.events == []\n")
    assert "1 passed" in run(installed("python"), "-m", "pytest", "-q", tmp_path / "test_it.py", cwd=tmp_path)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_typed_user_code_passes_against_the_wheel(
    installed: Callable[[str], Path], tmp_path: Path, checker: str
) -> None:
    """Strict mypy and strict pyright read the types of the installed package."""
    shutil.copy(ROOT / "tests" / "typing" / "calls.py", tmp_path)
    if checker == "mypy":
        options = ["--strict", "--warn-unreachable", "--python-executable", installed("python")]
    else:
        (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
        options = ["--pythonpath", installed("python")]
    run(sys.executable, "-m", checker, *options, "calls.py", cwd=tmp_path)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_wrong_call_is_found_by_the_type_checkers(
    installed: Callable[[str], Path], tmp_path: Path, checker: str
) -> None:
    """The types are not `Any`: a misspelt keyword and a wrong type are errors."""
    (tmp_path / "wrong.py").write_text(
        "from aftertask import Settings\nSettings(exlude=())\nSettings(thread_limit='8')\n"
    )
    option = "--python-executable" if checker == "mypy" else "--pythonpath"
    command = [sys.executable, "-m", checker, option, str(installed("python")), "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert {int(line) for line in re.findall(r"wrong\.py:(\d+)", done.stdout)} == {2, 3}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="pip 23.0 does not run on this Python")
def test_an_old_pip_installs_all_extras(built: tuple[Path, Path], tmp_path: Path) -> None:
    """`all` names the package's own extras, which the resolver of pip 23.0 must not go round in."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "pip==23.0", cwd=tmp_path)
    assert run(python, "-m", "pip", "--version", cwd=tmp_path).startswith("pip 23.0 ")
    run(python, "-m", "pip", "install", "-q", f"aftertask[all] @ {built[0].as_uri()}", cwd=tmp_path)
    run(python, "-c", "import aftertask.cli, apprise, fastapi, typer, yaml", cwd=tmp_path)
