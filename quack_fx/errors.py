"""The errors that users meet.

Every message is one line that quotes what was given and says what to do. The command line turns any `QuackError`
into that line and exit status 2; everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class QuackError(Exception):
    """Base of all errors that bad input causes."""


class LayoutError(QuackError, ValueError):
    """A layout that is malformed, or that does not fit the model it is used with."""


class TargetError(QuackError):
    """A target on the command line (file, module, config) that yields no model or no example inputs."""


class CaptureError(QuackError):
    """The forward pass of a model could not be recorded."""


class FactorError(QuackError, ValueError):
    """Learning-rate factors cannot be computed, for example because a block has norm zero."""


class OptimizerError(QuackError, ValueError):
    """An optimizer that QuacK cannot be attached to, or whose state does not fit."""


class VerifyError(QuackError):
    """The proof of a layout failed: a claimed weight row is wrong."""


class StripError(QuackError, ValueError):
    """A QK norm that cannot be removed as asked."""


class EmitError(QuackError):
    """A training step that cannot be written as source."""


class InlineError(QuackError, ValueError):
    """A traced step in which the weights, or their new values, cannot be told."""


class StepError(QuackError, ValueError):
    """A training step that cannot be taken, for example because the model returns no scalar loss."""


class RunError(QuackError, ValueError):
    """A record of a training run that cannot be written or read."""


def first_line(error: BaseException) -> str:
    """Type of an error and the first line of its text, cut where it is long."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
