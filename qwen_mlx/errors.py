"""Errors that a person can act on: one sentence that says what, where, expected, found and the fix."""


class QwenMLXError(ValueError):
    """A mistake in what the user gave. Command lines print its sentence on standard error and exit with 2."""


class GGUFError(QwenMLXError):
    """A GGUF file that cannot be read, or does not hold what it should; names the file and the field or tensor."""
