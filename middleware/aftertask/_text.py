"""Exceptions and stacks as text that may leave the process: message, stack, fingerprint, redaction."""

from __future__ import annotations

import difflib
import hashlib
import linecache
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType, TracebackType

from .errors import ProcessTaskError

Redact = Callable[[str], str]

#: Longer messages and stacks are cut to this many characters; a stack loses its middle.
LONGEST_MESSAGE = 1_000
LONGEST_STACK = 10_000

#: Replaces a text whose redaction failed: it must not leave the process unredacted.
WITHHELD = "[redaction failed: text withheld]"

#: Packages that call a task for us, in a thread too; their frames are left out of stacks.
CARRIERS = frozenset(
    {"aftertask", "anyio", "asyncio", "billiard", "celery", "outcome", "starlette", "threading", "trio"}
)

#: A stack of frames shows at most this many.
_SHOWN_FRAMES = 40

_OURS = str(Path(__file__).parent)
_LIBRARIES = tuple(
    {path for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts") if (path := sysconfig.get_path(name))}
)


def type_name(kind: type) -> str:
    """The name of a class: bare for builtins, otherwise `module.Qualname`."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def error_type(error: BaseException) -> str:
    """The class of an exception; for one from another process, the class that it had there."""
    return error.type_name if isinstance(error, ProcessTaskError) else type_name(type(error))


def error_message(error: BaseException, redact: Redact) -> str:
    """`str(error)`, redacted, at most 1 000 characters; never raises."""
    try:
        text = str(error)
    except Exception as broken:
        text = f"[its message cannot be read: {type(broken).__name__}]"
    text = redacted(text, redact)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 1]}…"


def stack(error: BaseException, redact: Redact) -> str:
    """
    The traceback as Python prints it, with causes and groups, from the task's own first frame on; without locals.

    Frames of aftertask, and of the libraries that carry a call into a thread, are left out. Redacted; a long text loses
    its middle.
    """
    elsewhere = error if isinstance(error, ProcessTaskError) else error.__cause__
    try:
        if isinstance(elsewhere, ProcessTaskError):
            text = elsewhere.stack
        else:
            summary = traceback.TracebackException.from_exception(error, compact=True)
            del summary.stack[: _frames_before_the_task(error.__traceback__)]
            text = "".join(summary.format())
    except Exception as broken:  # a __str__ or a source line that cannot be read
        text = f"[its stack cannot be read: {type(broken).__name__}]"
    return _without_middle(redacted(text, redact), LONGEST_STACK)


def fingerprint(error: BaseException) -> str:
    """
    Sixteen hex digits: the same for the same class raised in the same function of the app, on any line.

    The function is the innermost frame that belongs to the app; if there is none, the innermost of all.
    """
    # A timeout is raised by us; its cause has the place where the task was.
    trace = error.__traceback__ or (None if error.__cause__ is None else error.__cause__.__traceback__)
    codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    own = [code for code in codes if not is_library(code)] or codes
    place = f"{Path(own[-1].co_filename).name}:{own[-1].co_qualname}" if own else ""
    elsewhere = error if isinstance(error, ProcessTaskError) else error.__cause__
    if isinstance(elsewhere, ProcessTaskError):
        # Without line numbers, so that an edit elsewhere in the file keeps the fingerprint.
        place = re.sub(r", line \d+", "", "".join(re.findall(r"  File .*", elsewhere.stack)))
    return hashlib.sha256(f"{error_type(error)}\n{place}".encode()).hexdigest()[:16]


def redacted(text: str, redact: Redact) -> str:
    """The redacted text; never raises, and never returns text that could not be redacted."""
    try:
        shown: object = redact(text)
    except Exception:
        return WITHHELD
    return shown if isinstance(shown, str) else WITHHELD  # a function without `return`


def frames_text(frames: Sequence[FrameType], redact: Redact) -> str:
    """Frames, the innermost last, as Python prints a stack; redacted, without locals, a long one without its middle."""
    # The outer frames say what the app did, the innermost what it waits in.
    left_out = max(0, len(frames) - _SHOWN_FRAMES)
    half = _SHOWN_FRAMES // 2
    shown = [*frames[:half], *frames[len(frames) - half :]] if left_out else frames
    cached = set(linecache.cache)
    lines = traceback.StackSummary.extract((frame, frame.f_lineno or 0) for frame in shown).format()
    # Python keeps every source file it has read a line of: megabytes, for a stack that is shown once in a while.
    for name in set(linecache.cache) - cached:
        linecache.cache.pop(name, None)
    if left_out:
        lines.insert(half, f"  [{left_out} frames left out]\n")
    return _without_middle(redacted("".join(lines), redact), LONGEST_STACK)


def own_frames(stack: str) -> str:
    """A printed stack without the frames of libraries, except the innermost: it shows what the app called."""
    frames = re.findall(r"  File .*\n(?:    .*\n?)*", stack)
    shown = [frame for frame in frames[:-1] if not is_library_file(frame.partition('"')[2].partition('"')[0])]
    return "".join([*shown, *frames[-1:]]) or stack


def number_hint(value: object) -> str:
    """A hint on how to write a number that was passed as text; empty for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value):
        return f"; write {value.strip()} without quotes"
    return ""


def name_hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The likely name behind an unknown one, or else all known names. A prefix does not count."""
    close = difflib.get_close_matches(name.removeprefix(prefix), [each.removeprefix(prefix) for each in known], 1)
    return f"did you mean {prefix + close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def is_library(code: CodeType) -> bool:
    """Whether this is not the app's own code but aftertask's, a library's or Python's."""
    return is_library_file(code.co_filename)


def is_library_file(name: str) -> bool:
    """The same for a file name."""
    return name.startswith((_OURS, "<frozen")) or name.startswith(_LIBRARIES)


def package_of(frame: FrameType) -> str:
    """The top-level package of a frame's code."""
    name: object = frame.f_globals.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else ""


def _frames_before_the_task(trace: TracebackType | None) -> int:
    """How many frames at the outer end belong to aftertask or carry its call; 0 if the task has no frame."""
    count = skipped = 0
    ours = False
    while trace is not None:
        count += 1
        if trace.tb_frame.f_code.co_filename.startswith(_OURS):
            ours, skipped = True, count
        elif package_of(trace.tb_frame) in (CARRIERS if ours else ("celery",)):
            skipped = count
        else:
            break
        trace = trace.tb_next
    return skipped if trace is not None else 0


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[{len(text) - longest} characters left out]\n{text[-half:]}"


REDACTED = "[redacted]"

#: Longer texts lose their middle before they are searched.
LONGEST_REDACTED = 20_000

_KEY_WORDS = (
    *("password", "passwd", "passphrase", "passcode", "pass", "pwd", "secret", "token", "authorization", "auth"),
    *("api_key", "api-key", "apikey", "access_key", "access-key", "accesskey", "private_key", "private-key"),
    *("credential", "credentials", "cookie", "session_id", "session-id", "sessionid", "session", "csrf", "signature"),
    *("dsn", "cvv", "cvc", "pin", "ssn", "otp"),
)

#: What is searched for, and words of which the text must contain one, or the search is skipped: most texts have none.
_KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    # scheme://user:password@host: the password; a user name alone is no secret.
    (("://",), r"(?P<kept>\b[a-z][a-z0-9+.-]{1,20}://[^\s:/@'\"]{0,200}:)[^\s/@'\"]{1,500}(?=@)"),
    # key=value, key: value, "key": "value"; the key may have a prefix: db_password, X-Api-Key.
    (
        _KEY_WORDS,
        rf"(?P<kept>(?<![a-z0-9])(?:{'|'.join(_KEY_WORDS)})['\"]?\s{{0,4}}[=:]\s{{0,4}})"
        r"(?:(?:bearer|basic|digest|token)\s{1,4}[^\s,;'\"]{1,4000}"
        r"|\"[^\"\n]{0,4000}\"|'[^'\n]{0,4000}'|[^\s,;&)}\]'\"]{1,4000})",
    ),
    # Credentials after their scheme.
    (("bearer ", "basic "), r"(?P<kept>\b(?:bearer|basic)\s{1,4})[a-z0-9+/=_~.-]{6,4000}"),
    # Tokens recognised by their shape: JWT, AWS, GitHub, GitLab, Slack, Stripe, Google.
    (("eyj",), r"\beyJ[a-z0-9_-]{8,4000}\.[a-z0-9_-]{4,4000}(?:\.[a-z0-9_-]{0,4000})?"),
    (("akia", "asia"), r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    (("gh", "glpat-"), r"\bgh[opsur]_[a-z0-9]{20,255}|\bgithub_pat_[a-z0-9_]{20,255}|\bglpat-[a-z0-9_-]{16,255}"),
    (("xox", "k_live_", "k_test_"), r"\bxox[abeoprs]-[a-z0-9-]{10,255}|\b[rsp]k_(?:live|test)_[a-z0-9]{10,255}"),
    (("aiza",), r"\bAIza[a-z0-9_-]{30,60}"),
    # E-mail addresses.
    (("@",), r"(?<![a-z0-9._%+-])[a-z0-9._%+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){0,8}\.[a-z]{2,24}\b"),
)
_PATTERNS = tuple((words, re.compile(pattern, re.IGNORECASE)) for words, pattern in _KINDS)

# 13 to 19 digits, in groups or not.
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")


def default_redact(text: str) -> str:
    """
    Replace what looks like a secret or an e-mail address by `[redacted]`; the rest stays readable.

    Recognised: passwords in URLs, bearer and basic credentials, values whose key is password, secret, token, API key,
    cookie, session, DSN and the like, JWTs, keys of AWS, GitHub, GitLab, Slack, Stripe and Google, card numbers with a
    right check digit (Luhn, ISO/IEC 7812-1), e-mail addresses. Not recognised: names, addresses, telephone numbers,
    secrets without a key or a known shape; give `Settings(redact=…)` a function of your own for those.

    Text longer than 20 000 characters loses its middle.
    """
    text = _without_middle(text, LONGEST_REDACTED)
    lowered = text.lower()
    for words, pattern in _PATTERNS:
        if any(word in lowered for word in words):
            text = pattern.sub(_replace, text)
    return _CARD.sub(_replace_card, text)


def _replace(found: re.Match[str]) -> str:
    return found.groupdict().get("kept", "") + REDACTED


def _replace_card(found: re.Match[str]) -> str:
    return REDACTED if _luhn(found[0]) else found[0]


def _luhn(number: str) -> bool:
    total = 0
    for place, digit in enumerate(int(char) for char in reversed(number) if char.isdigit()):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0
