"""Exceptions of amici_eval: every one names the value, the rule it breaks and the fix."""

from __future__ import annotations

from amici_eval.common.text import mask_secrets


class AmiciEvalError(Exception):
    """Base of all errors that a user of amici_eval can mend.

    Parameters
    ----------
    value
        What was found, with the offending value in it.
    rule
        What is required instead.
    fix
        What the user can do about it.
    """

    def __init__(self, value: str, *, rule: str, fix: str) -> None:
        # a URI in a message may carry a password or a signed query
        self.value, self.rule, self.fix = (mask_secrets(text) for text in (value, rule, fix))
        super().__init__(self.value, self.rule, self.fix)

    def __str__(self) -> str:
        return f"{self.value}: {self.rule}; {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default pickling, and joblib workers send errors back pickled
        return (_rebuild, (type(self), self.value, self.rule, self.fix))


def first_line(error: BaseException) -> str:
    """Return the class and the first line of another library's error, for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # a line that ends with a colon needs the next one
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return mask_secrets(f"{type(error).__name__}: {said[:300]}")


def _rebuild(cls: type[AmiciEvalError], value: str, rule: str, fix: str) -> AmiciEvalError:
    return cls(value=value, rule=rule, fix=fix)


class InvalidSpecError(AmiciEvalError, ValueError):
    """A setting is outside what it may be."""


class DataError(AmiciEvalError, ValueError):
    """The AnnData is missing, unreadable or does not fit the model."""


class ModelFormatError(AmiciEvalError, ValueError):
    """A model file is truncated, altered or of another kind."""


class UnsafePickleError(ModelFormatError):
    """A pickle asks for something outside the allow-list."""


class ModelNotFoundError(AmiciEvalError, LookupError):
    """No such model, version, alias or logged model."""


class DeviceError(AmiciEvalError, RuntimeError):
    """The compute device that was asked for is not there."""


class DeviceMemoryError(DeviceError):
    """A device, or the machine, has too little memory for the work."""


class LaunchError(AmiciEvalError, RuntimeError):
    """Worker processes cannot be had, cannot be given the work, or were lost."""


class TrackingError(AmiciEvalError, RuntimeError):
    """The tracking server cannot be reached or refused a write."""


class LeaseHeldError(AmiciEvalError, RuntimeError):
    """Another process is at work on the same thing."""


class OutputError(AmiciEvalError, OSError):
    """A folder cannot be written."""
