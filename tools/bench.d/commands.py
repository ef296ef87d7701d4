"""Running other programs: every one has a time limit, and none can hold up the benchmark."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

KILL_WAIT_S = 20


class CommandError(Exception):
    """A program failed; the text is what a reader of the report needs."""


class Stuck(CommandError):
    """A program was killed and did not end: what it waits for must not be touched again."""


def run(command: Sequence[str | Path], seconds: float = 60) -> str:
    """Runs `command` and returns its standard output.

    A daemon inherits the streams of the program that starts it, and a pipe would stay open for as
    long as the daemon lives: the output goes through files.
    """
    words = [str(word) for word in command]
    name = Path(words[0]).name
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        except OSError as error:
            raise CommandError(f"{name}: {error.strerror}") from error
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(process, name)
            raise CommandError(f"{name}: not done after {seconds:.0f} s") from None
        except BaseException:
            kill(process, name)
            raise
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if status != 0:
        raise CommandError(f"{name}: status {status}: {last_line(stderr or stdout)}")
    return stdout


@contextmanager
def beside(command: Sequence[str | Path] | None) -> Iterator[None]:
    """`command`, if there is one, runs meanwhile; it must not have ended when the time is over."""
    if command is None:
        yield
        return
    words = [str(word) for word in command]
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, start_new_session=True, **silent)
    try:
        yield
        if process.poll() is not None:
            raise CommandError(f"{Path(words[0]).name}: status {process.returncode} before its time was over")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(KILL_WAIT_S)
            except subprocess.TimeoutExpired:
                kill(process, words[0])


def kill(process: subprocess.Popen, name: str) -> None:
    """Ends a program of ours; the wait is bounded because it may hang in the kernel."""
    process.kill()
    try:
        process.wait(KILL_WAIT_S)
    except subprocess.TimeoutExpired:
        raise Stuck(f"{name}: killed, and still there after {KILL_WAIT_S} s") from None


def last_line(text: str) -> str:
    """Programs put the reason of a failure at the end of what they print."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Waits until `condition` holds; `what` names it in the error."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CommandError(f"after {seconds:.0f} s still not so: {what}")
        time.sleep(0.005)
