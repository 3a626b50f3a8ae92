"""What of an exception's text must not leave the process."""

from __future__ import annotations

import re

REDACTED = "[redacted]"

#: Longer text is cut before it is looked at: the middle goes, head and tail stay.
LONGEST = 20_000

_KEY_WORDS = (
    *("password", "passwd", "passphrase", "passcode", "pass", "pwd", "secret", "token", "authorization", "auth"),
    *("api_key", "api-key", "apikey", "access_key", "access-key", "accesskey", "private_key", "private-key"),
    *("credential", "credentials", "cookie", "session_id", "session-id", "sessionid", "session", "csrf", "signature"),
    *("dsn", "cvv", "cvc", "pin", "ssn", "otp"),
)

#: What is looked for, and words of which the text must have one, or it is not looked for at all: most text has none.
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
    # Credentials by their scheme, wherever they stand.
    (("bearer ", "basic "), r"(?P<kept>\b(?:bearer|basic)\s{1,4})[a-z0-9+/=_~.-]{6,4000}"),
    # Tokens that are known by their shape: JWT, AWS, GitHub, GitLab, Slack, Stripe, Google.
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
    Take out of a text what looks like a secret or a person; the rest stays readable.

    Knows: passwords in URLs, bearer and basic credentials, values whose key says password, secret, token, API key,
    cookie, session, DSN and the like, JWTs, keys of AWS, GitHub, GitLab, Slack, Stripe and Google, card numbers with a
    right check digit (Luhn, ISO/IEC 7812-1), e-mail addresses. Does not know: names, addresses, telephone numbers,
    secrets without a key or a known shape; give `Settings(redact=…)` a function of your own for those.

    Text longer than 20 000 characters loses its middle.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n[{len(text) - LONGEST} characters left out]\n{text[-half:]}"
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
