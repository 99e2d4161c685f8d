"""Exceptions raised to users.

Every message is one line that quotes the input and says what to do. The command line prints it and exits with
status 2; any exception that is not a `QuackError` is a bug in quack-fx and keeps its traceback.
"""

from __future__ import annotations


class QuackError(Exception):
    """Base class of all errors caused by bad input."""


class LayoutError(QuackError, ValueError):
    """A layout is malformed or does not fit the model."""


class TargetError(QuackError):
    """A command-line target (file, module, config) gives no model or no example inputs."""


class CaptureError(QuackError):
    """The forward pass of a model could not be recorded."""


class FactorError(QuackError, ValueError):
    """Learning-rate factors cannot be computed, for example because a block has norm zero."""


class OptimizerError(QuackError, ValueError):
    """QuacK cannot be attached to an optimizer, or the optimizer's state does not fit."""


class VerifyError(QuackError):
    """Verification of a layout failed: it names a wrong weight row."""


class StripError(QuackError, ValueError):
    """A QK norm cannot be removed as requested."""


class EmitError(QuackError):
    """A training step cannot be written as source code."""


class InlineError(QuackError, ValueError):
    """The weights or their new values cannot be identified in a traced step."""


class StepError(QuackError, ValueError):
    """A training step cannot be run, for example because the model returns no scalar loss."""


class RunError(QuackError, ValueError):
    """The record of a training run cannot be written or read."""


def first_line(error: BaseException) -> str:
    """Type of an error and the first line of its message, at most 300 characters of it."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
