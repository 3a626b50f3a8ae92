"""`aftertask check module:app`: settings and policies in force, and what is wrong or risky; no task is run."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import inspect
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from starlette.applications import Starlette

from .._mistakes import collected
from .._signatures import takes
from .._text import default_redact
from ..alerts import send_test
from ..middleware import AftertaskMiddleware
from ..policies import Limit, Retry
from ..settings import Settings
from ..tasks import code_name
from ._findings import Finding, findings
from ._output import refusal
from ._subject import Subject

SEVERITIES = ("note", "warning", "error")


def check(
    app: Annotated[str, typer.Argument(metavar="MODULE:APP", help="The app, as for uvicorn: main:app.")],
    app_dir: Annotated[Path, typer.Option(help="Folder in which to look for the module.")] = Path(),
    factory: Annotated[bool, typer.Option("--factory", help="APP is a function that returns the app.")] = False,
    workers: Annotated[int | None, typer.Option(help="Number of worker processes that will serve it.")] = None,
    fail_on: Annotated[
        str, typer.Option(help="The least severity that ends with code 1: note, warning, error.")
    ] = "warning",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    send_test_alert: Annotated[bool, typer.Option(help="Also send a test alert to each channel.")] = False,
) -> None:
    """Import an app; print what is wrong or risky, its tasks' policies and its settings. See --fail-on for code 1."""
    if fail_on not in SEVERITIES:
        raise refusal(f"--fail-on must be note, warning or error, got {fail_on!r}")
    quiet = contextvars.copy_context()
    quiet.run(collected.set, [])  # a mistake that aftertask would log is a finding here
    with contextlib.redirect_stdout(sys.stderr):  # what the app prints is no part of the report
        loaded = quiet.run(_load, app, app_dir, factory)
        subject = quiet.run(Subject, loaded, workers or int(os.environ.get("WEB_CONCURRENCY") or 1), _build)
    found = sorted(findings(subject), key=lambda one: (-SEVERITIES.index(one.severity), one.file or "", one.line or 0))
    channels = subject.settings.alerts if send_test_alert and subject.settings is not None else ()
    sent = [dataclasses.asdict(tested) for tested in send_test(channels)]
    if as_json:
        typer.echo(json.dumps(_as_json(app, subject, found, sent), indent=2))
    else:
        _print(app, subject, found, sent)
    bad = [one for one in found if SEVERITIES.index(one.severity) >= SEVERITIES.index(fail_on)]
    if send_test_alert and not sent:
        typer.echo(
            "aftertask: no test alert was sent: no channel is configured; set AFTERTASK_ALERTS or Settings(alerts=[…])",
            err=True,
        )
    if bad or any(not one["ok"] for one in sent) or (send_test_alert and not sent):
        raise typer.Exit(1)


def _load(target: str, folder: Path, factory: bool) -> Any:
    name, _, path = target.partition(":")
    if name.endswith(".py") or "/" in name or os.sep in name:
        file = Path(name)
        module_name, parent = file.stem, file.parent
        while (parent / "__init__.py").exists() and parent != parent.parent:
            module_name, parent = f"{parent.name}.{module_name}", parent.parent
        place = f" --app-dir {parent}" if parent != Path() else ""
        raise refusal(f"name the module, not its file: {module_name}:{path or 'app'}{place}")
    if not name or not path:
        raise refusal(f"name the app as module:app, such as {name or 'main'}:app, got {target!r}")
    sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise refusal(
                f"there is no module {name!r} in {folder.resolve()}; name its folder with --app-dir"
            ) from None
        raise refusal(f"{name!r} cannot be imported: {_short_error(error, folder)}") from None
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            apps = [key for key, value in vars(module).items() if isinstance(value, Starlette)]
            hint = f"; did you mean {name}:{apps[0]}?" if apps else ""
            raise refusal(f"the module {name!r} has no {path!r}{hint}")
    if factory:
        if not callable(found) or not takes(found, 0, unknown=False):
            raise refusal(f"{target} cannot be called without arguments, as --factory does")
        try:
            found = found()
        except Exception as error:
            raise refusal(f"the factory {target} failed: {_short_error(error, folder)}") from None
    elif inspect.isfunction(found) and not takes(found, 3, unknown=False):
        if takes(found, 0, unknown=False):
            raise refusal(f"{target} is a function without arguments: if it returns the app, add --factory")
        raise refusal(f"{target} is a function, but does not take scope, receive and send, so it is not an ASGI app")
    if not callable(found):
        raise refusal(
            f"{target} is of type {type(found).__name__}, not an ASGI app; a function that returns one needs --factory"
        )
    return found


def _short_error(error: Exception, folder: Path) -> str:
    """What was raised, and by which line of the app."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(folder.resolve())
    ]
    place = f" ({_short(own[-1].filename)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{place}"


async def _nowhere(scope: object, receive: object, send: object) -> None:
    pass


def _build(*args: object, settings: Settings | None = None, signals: Any = None, **given: Any) -> Settings:
    """Build a middleware and return its settings; the usual signals and the journal's file are for an app that runs."""
    chosen = built = Settings.from_env() if settings is None else settings
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
        if isinstance(chosen, Settings) and chosen.journal is not None:
            built = dataclasses.replace(chosen, journal=Path(folder, "journal"))
        AftertaskMiddleware(_nowhere, *args, settings=built, signals=() if signals is None else signals, **given)
    return chosen


# --- what is printed


def _as_json(app: str, subject: Subject, found: list[Finding], sent: list[dict[str, object]]) -> dict[str, object]:
    return {
        "app": app,
        "settings": None if subject.settings is None else _settings(subject.settings),
        "tasks": {name: _policy(subject, name) for name in subject.tasks},
        "findings": [dataclasses.asdict(one) for one in found],
        "test_alerts": sent,
    }


def _print(app: str, subject: Subject, found: list[Finding], sent: list[dict[str, object]]) -> None:
    count = {severity: sum(one.severity == severity for one in found) for severity in reversed(SEVERITIES)}
    typer.echo(f"{app}: " + ", ".join(f"{number} {name}{'s' * (number != 1)}" for name, number in count.items()))
    for one in found:
        place = "" if one.file is None else f"{_short(one.file)}:{one.line}: "
        typer.echo(f"\n{place}{one.severity}: {one.message} [{one.kind}]\n  {one.remedy}")
    if subject.settings is not None:
        typer.echo("\nTasks")
        for name in subject.tasks:
            policy = ", ".join(f"{key}={value}" for key, value in _policy(subject, name).items())
            typer.echo(f"  {name}: {policy or 'no policy'}")
        if not subject.tasks:
            typer.echo("  none is registered by @task, and none is added in the app's own modules")
        typer.echo("\nSettings that differ from the defaults")
        settings, default = subject.settings, Settings()
        shown = _settings(settings)
        changed = [name for name in shown if getattr(settings, name) != getattr(default, name)]
        for name in changed:
            typer.echo(f"  {name} = {shown[name]}")
        if not changed:
            typer.echo("  none")
    for tested in sent:
        result = "accepted" if tested["ok"] else f"FAILED: {tested['error']}"
        typer.echo(f"\ntest alert to {tested['channel']}: {result} ({tested['seconds']:.2f} s)")


def _short(file: str) -> str:
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _settings(settings: Settings) -> dict[str, str]:
    """Each setting, without secrets: an object is shown by its class, an alert's channel by its name."""
    return {field.name: _shown(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def _policy(subject: Subject, name: str) -> dict[str, str]:
    return {option: _shown(value) for option, value in subject.policy(name).chosen().items() if option != "name"}


def _shown(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str):
        return default_redact(value)
    if isinstance(value, Retry):
        return f"{value.attempts} attempts"
    if isinstance(value, Limit):
        return f"{value.name}:{value.size}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_shown(one) for one in value) or "none"
    if isinstance(value, dict) or hasattr(value, "items"):
        return ", ".join(str(key) for key in value) or "none"  # type: ignore[attr-defined]  # a mapping
    name = getattr(value, "name", None)
    if isinstance(name, str):
        return default_redact(name)
    return code_name(value)
