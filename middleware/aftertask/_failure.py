"""placeholder until the real one lands"""

import traceback


def error_type(error):
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def error_message(error, redact):
    return redact(str(error))


def stack(error, redact):
    return redact("".join(traceback.format_exception(error)))


def fingerprint(error):
    return "0" * 16
