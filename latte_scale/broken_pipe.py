"""Ends a command quietly when the reader of its output is gone, as in `latte-data verify DIR | head`.

In: a command as a function. Out: its exit code, or that of a process that SIGPIPE ended. The signal itself stays
ignored, because it would also end the process when a store or a peer closes a connection. And a BrokenPipeError is an
OSError, which every verb reports as its user's mistake. So the output streams raise an exception that no verb catches.
"""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from typing import Any

SIGPIPE_CODE = 128 + 13
"""What a shell shows of a command that SIGPIPE ended."""


class _ReaderLeft(BaseException):
    """The output's reader is gone. Like Ctrl-C this is no error of the command, so its handlers do not catch it."""


class _Stream:
    """A text stream whose broken pipe is `_ReaderLeft`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Like TextIO.write."""
        return self._or_reader_left(self._stream.write, text)

    def flush(self) -> None:
        """Like TextIO.flush."""
        self._or_reader_left(self._stream.flush)

    def _or_reader_left(self, call: Callable[..., Any], *args: str) -> Any:
        try:
            return call(*args)
        except BrokenPipeError:
            raise _ReaderLeft from None


def until_reader_leaves(command: Callable[[], int]) -> int:
    """Run the command; returns its exit code, or SIGPIPE_CODE when the reader of its output is gone."""
    watched = [(redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)]
    streams = [(redirect, _Stream(stream)) for redirect, stream in watched if stream is not None]  # None: closed
    try:
        with ExitStack() as stack:
            for redirect, stream in streams:
                stack.enter_context(redirect(stream))
            try:
                return command()
            finally:
                for _, stream in streams:
                    stream.flush()  # buffered output would fail when the process ends
    except _ReaderLeft:
        for _, stream in streams:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
        return SIGPIPE_CODE
