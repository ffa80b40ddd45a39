"""User-facing errors: one line each, saying what was expected, what was found and which key to change.

Every `UserError` ends the command with exit code 2 and its message on stderr, also when a rank of a
worker process found it. Anything else is a defect of ours and ends with exit code 1 and a traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: `expected`, `found` and `key` make up the one line that is shown."""

    def __init__(self, message: str, *, expected: str = "", found: str = "", key: str = "") -> None:
        parts = [message]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        line = "; ".join(parts)
        self.line, self.key = " ".join(line.split()), key
        super().__init__(f"{self.line} (change {key})" if key else self.line)

    def with_key(self, key: str) -> UserError:
        """The same mistake, mended by another key: that of the node whose numbers were handed on."""
        return type(self)(self.line, key=key)


class ConfigError(UserError):
    """An unknown key, a value of the wrong type, or values that contradict each other."""


class ArchError(UserError):
    """An architecture that is not supported, or a target that does not fit its source."""


class CheckpointError(UserError):
    """A checkpoint directory that is missing, truncated or inconsistent."""


class DataError(UserError):
    """Text, token files or a tokenizer that cannot be used."""


class LayoutError(UserError):
    """A parallel layout that does not fit the model or the number of processes."""


class ScoresError(UserError):
    """A score file that does not belong to this model, or lacks what the target needs."""
