"""The program. In: the words of a command line. Out: an exit status.

0: done. 1: the check failed (a proof failed, no attention was found). 2: bad input, reported in one line on stderr that
says what to do; `--debug` adds the traceback and the log. 130: interrupted. Any other error is a bug in quack-fx and
keeps its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated

import typer

from quack_fx import __version__
from quack_fx.errors import QuackError, VerifyError

from .bench import bench
from .common import command as open_command
from .convert import convert
from .inspect import inspect
from .report import report
from .tune import tune
from .verify import verify
from .watch import watch

app = typer.Typer(
    name="quack-fx",
    help="Find the query/key pairs of any PyTorch model, and train it with QuacK learning-rate scaling.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (inspect, convert, verify, bench, tune, report, watch):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quack-fx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Arguments:
        argv: The words after the program's name; by default those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    command = typer.main.get_command(app)
    try:
        with open_command(), _log_on_stderr() if debug else nullcontext():
            status = command.main(words, prog_name="quack-fx", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except QuackError as error:
        return _refuse(str(error), 1 if isinstance(error, VerifyError) else 2, debug)
    except BrokenPipeError:  # whoever reads stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _refuse("this machine has too little memory left; pass a smaller configuration of the model", 2, debug)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # An error of the command-line parser, whose class lives elsewhere in each version of typer.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "quack-fx"
        if not message():
            return 2  # without a command, the help was shown
        return _refuse(f"{message().rstrip('.')}; see {where} --help", 2, debug=False)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show everything that quack-fx logs."""
    logger, handler = logging.getLogger("quack_fx"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _refuse(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("quack-fx: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
