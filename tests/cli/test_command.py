"""The `aftertask` command itself."""

from __future__ import annotations

import subprocess
import sys

import aftertask


def run(*arguments: str, code: str = "from aftertask.cli import main; main()") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=15)


def test_it_tells_its_version() -> None:
    """The package's."""
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"aftertask {aftertask.__version__}\n", "")


def test_alone_it_shows_what_it_can_do() -> None:
    """Help, and no traceback."""
    done = run()
    assert "Usage: " in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_without_its_extra_it_says_how_to_install_it() -> None:
    """Typer is no dependency of aftertask itself."""
    hidden = "import sys; sys.modules['typer'] = None\nimport importlib.util as u\n"
    hidden += "u.find_spec = lambda name, _=u.find_spec: None if name == 'typer' else _(name)\n"
    done = run("--version", code=hidden + "from aftertask.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr == "the aftertask command needs Typer; install it with: pip install 'aftertask[cli]'\n"
