"""main.py in a forked process, which need not import torch again."""

import importlib
import os
import pty
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from conftest import Result

import main

# Each process's first update would import it.
importlib.import_module("torch._dynamo")

PATIENCE = 120.0  # seconds until a process counts as hung


class Child:
    """A process that runs main.py and writes what it prints into files.

    Args:
        argv: the command line.
        prepare: called in the process beforehand.
        terminal: it has a terminal of its own, whose other end is `terminal`, as stdin, stdout and
            stderr.
    """

    def __init__(
        self,
        argv: Iterable[object],
        prepare: Callable[[], object] = lambda: None,
        terminal: bool = False,
    ) -> None:
        # "a": what the process writes goes to the end, wherever this process reads
        self._printed = [tempfile.TemporaryFile("a+", errors="replace") for _ in range(2)]  # noqa: SIM115
        self._code: int | None = None
        self.terminal = -1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forks where threads are
            if terminal:
                self.pid, self.terminal = pty.fork()
            else:
                self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                for number, file in enumerate(self._printed, start=1):
                    if not terminal:
                        os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))  # noqa: SIM115
                torch.set_num_threads(1)  # libgomp's threads are not there after a fork
                prepare()
                code = main.main([str(arg) for arg in argv])
            except BaseException:
                traceback.print_exc()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """True once the process has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def printed(self) -> list[str]:
        """What it has written to stdout and stderr so far."""
        texts = []
        for file in self._printed:
            file.seek(0)
            texts.append(file.read())
        return texts

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Wait until a condition holds; fails if the process ends before, or hangs."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > deadline and not self.ended():
                self.send(signal.SIGKILL)
                raise AssertionError(f"it hangs: {self.printed()}")
            assert not self.ended() or holds(), self.printed()
            time.sleep(0.01)

    def wait_for(self, path: Path, text: str = "") -> None:
        """Wait until a file is there and has a text."""
        self.wait_until(lambda: path.exists() and text in path.read_text(errors="replace"))

    def wait(self) -> Result:
        """Wait for the end."""
        self.wait_until(self.ended)
        assert self._code is not None
        result = Result(self._code, *self.printed())
        for file in self._printed:
            file.close()
        return result
