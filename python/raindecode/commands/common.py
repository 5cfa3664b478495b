"""What the commands share: errors as one sentence, quiet libraries, loading a model, text that is safe to print."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import transformers
import typer
from rich.console import Console
from rich.text import Text

from raindecode.decoder import Decoder
from raindecode.errors import ConfigError, RainDecodeError
from rainkernels.errors import RainKernelsError

EXIT_MISSING = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
REPORTED = (RainDecodeError, RainKernelsError, FloatingPointError)
"""Errors that say by themselves what is wrong. Anything else is a bug and keeps its traceback."""

_P = ParamSpec("_P")

# Of the C0 and C1 control characters only newline and tab may reach a terminal: a model must not be able to steer it.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def guarded(command: Callable[_P, None]) -> Callable[_P, None]:
    """`command` with typed errors and Ctrl-C turned into one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except REPORTED as error:
            complain(str(error))
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except BrokenPipeError:
            raise  # the reader went away: typer ends quietly
        except OSError as error:
            complain(f"the output cannot be written: {error.strerror or error}")
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error

    return run


def complain(message: str) -> None:
    """One line on stderr, marked as an error."""
    _stderr().print(
        Text("error: ", style="bold red").append(" ".join(message.split()), style="not bold default"), soft_wrap=True
    )


def say(message: str) -> None:
    """One line on stderr."""
    _stderr().print(Text(message, style="dim"), soft_wrap=True)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars, advice and deprecation notices away from the user's terminal."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    hub: Any = importlib.import_module("huggingface_hub.utils")
    hub.logging.set_verbosity_error()
    if sys.stderr.isatty():
        hub.enable_progress_bars()  # transformers turned these off too, but a download may take long
    for library in ("torch", "transformers", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")


def load_decoder(model: str, **options: Any) -> Decoder:
    """Decoder.from_pretrained with a spinner on a terminal. Raises as it does."""
    console = _stderr()
    if not console.is_terminal:
        return Decoder.from_pretrained(model, **options)
    with console.status(Text(f"loading {model}")):
        return Decoder.from_pretrained(model, **options)


def raise_first(errors: Sequence[BaseException], total: int, what: str) -> None:
    """Raise the first of some errors, saying how many of the `total` requests, or whatever they are called, failed."""
    first = errors[0]
    if isinstance(first, REPORTED) and total > 1:
        raise RainDecodeError(f"{len(errors)} of {total} {what} failed; the first: {first}") from first
    raise first


def one_of(what: str, given: str, allowed: tuple[str, ...]) -> str:
    """`given`, when it is allowed.

    Raises:
        ConfigError: it is not; the message lists what is.
    """
    if given not in allowed:
        raise ConfigError(f"{what} is {given!r}; allowed: {', '.join(allowed)}")
    return given


def printable(text: str) -> str:
    """`text` without control characters other than newline and tab."""
    return text.translate(_CONTROLS)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)
