"""placeholder until the real one lands"""


def default_redact(text: str) -> str:
    return text
