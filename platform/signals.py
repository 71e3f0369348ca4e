"""Handling of SIGINT (Ctrl-C) and SIGTERM.

After such a signal, the command ends within 20 seconds, with one line on stderr and exit status 130.

A thread receives every signal immediately, even while the main thread imports PyTorch, waits for a locked database or
computes a long step. Outside `guarded`, where no work can be lost, the thread ends the process. Inside `guarded`, the
main thread has `GRACE_S` seconds to clean up. After this time, or on a second signal, the thread ends the process.

Signals have their default effect until `watch` is called. The entry point calls `watch` before all other imports.
"""

import atexit
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE_S = 15.0  # for cleanup in `guarded` after the first signal
INTERRUPTED = 130  # exit status of shells after Ctrl-C
WATCHED = (signal.SIGINT, signal.SIGTERM)


class _State:
    """State shared by the signal thread and the main thread."""

    def __init__(self) -> None:
        self.watching = False
        self.has_arrived = False  # a signal has arrived, even if a library handled it
        self.interrupted = False  # a signal has interrupted the main thread
        self.hints: list[str] = []  # one for each active `guarded` block of the main thread
        self.children: list[subprocess.Popen[bytes]] = []  # processes that must not outlive this one
        self.status: int | None = None  # exit status once the command has ended
        self.ending = threading.Lock()


_state = _State()


def watch() -> None:
    """Start to watch for signals, or restore the handlers if a library has replaced them.

    Ignored signals stay ignored, for example under nohup. Outside the main thread, the call has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if not _state.watching:
        _state.watching = True
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=_listen, args=(receiver, sender), name="signals", daemon=True).start()
        sys.unraisablehook = _report_unraisable
        atexit.register(_exit_process)  # registered first, hence runs last
    for number in WATCHED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def watch_again() -> None:
    """Restore handlers that a library has replaced; no effect if `watch` was never called."""
    if _state.watching:
        watch()


def is_watching() -> bool:
    """Return True if `watch` has been called; otherwise signals have their default effect."""
    return _state.watching


def was_interrupted() -> bool:
    """Return True if a signal has arrived since `watch`, even if a library handled it."""
    return _state.has_arrived


@contextmanager
def guarded(hint: str = "") -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on a signal, and allow `GRACE_S` seconds for cleanup.

    Guards can be nested. In other threads, a guard has no effect, since Python never raises KeyboardInterrupt there.

    Args:
        hint: Text after "interrupted" in the line that `end_interrupted` prints: what is kept and how to resume.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.hints.append(hint)
    try:
        yield
    except Exception as error:
        if _state.interrupted and _is_caused_by_interrupt(error):
            raise KeyboardInterrupt from None
        raise
    except (KeyboardInterrupt, SystemExit):
        _state.interrupted = True  # SystemExit: by Ray's handler, perhaps before `_listen` has read the signal
        raise
    finally:
        # Keep the hint for a second signal that arrives before the caller has reported the first one.
        if not _state.interrupted:
            _state.hints.pop()


def _is_caused_by_interrupt(error: BaseException | None) -> bool:
    """Return True if KeyboardInterrupt caused an error; Python 3.11 wraps exceptions from `__set_name__`."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


@contextmanager
def defer_signal() -> Iterator[Callable[[], bool]]:
    """Defer the first signal, so that a step can finish; the next signal is handled as before.

    Yields:
        Function that returns True once a signal has arrived. Outside the main thread, as in Ray workers, the function
        always returns False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    has_arrived = False

    def defer(number: int, frame: FrameType | None) -> None:
        nonlocal has_arrived
        has_arrived = _state.interrupted = True
        signal.signal(number, previous_handlers[number])

    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in WATCHED}
    previous_handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}  # nohup
    for number in previous_handlers:
        signal.signal(number, defer)
    try:
        yield lambda: has_arrived
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def owned(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Terminate a child process if this process ends immediately within the block, as after a second signal.

    No `finally` clause runs then. The same holds if a library has swallowed the first signal's KeyboardInterrupt.
    """
    _state.children.append(process)
    try:
        yield
    finally:
        _state.children.remove(process)


def command_ended(status: int) -> None:
    """Register that the command has ended and reported it; later signals end the process with `status`."""
    _state.status = status


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.status is not None or not _state.hints:
        end_interrupted()
    if not _state.interrupted:
        _state.interrupted = True
        raise KeyboardInterrupt


def _listen(receiver: socket.socket, sender: socket.socket) -> None:
    deadline: float | None = None
    while True:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([receiver], [], [], remaining)
        is_watched = ready and any(number in WATCHED for number in receiver.recv(64))
        if ready and not is_watched:
            continue  # another signal, such as SIGCHLD
        _state.has_arrived = _state.has_arrived or bool(is_watched)
        if deadline is not None or _state.status is not None or not _state.hints:
            end_interrupted()
        deadline = time.monotonic() + GRACE_S


def end_interrupted() -> None:
    """End the process immediately with the line "interrupted" and exit status 130."""
    hint = next(filter(None, reversed(_state.hints)), "")
    end_process(f"interrupted{'; ' if hint else ''}{hint}", INTERRUPTED)


def end_process(line: str, status: int) -> None:
    """End the process immediately, from any thread.

    The operating system cleans up open files, Ray and locks; child processes of `owned` blocks are terminated. If
    `command_ended` was called before, no line is printed, and the process ends with the status given there.

    Args:
        line: Message for stderr.
        status: Exit status.
    """
    if not _state.ending.acquire(blocking=False):
        time.sleep(2 * GRACE_S)  # another thread is already ending the process
    if _state.status is None:
        with suppress(OSError):
            # A live display may have hidden the cursor and left it in the middle of a line.
            os.write(2, ("\r\x1b[K\x1b[?25h" if os.isatty(2) else "").encode() + f"linflab: {line}\n".encode())
    for child in _state.children:
        with suppress(OSError, subprocess.TimeoutExpired):
            child.terminate()
            child.wait(1)
    os._exit(status if _state.status is None else _state.status)


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report unraisable exceptions like Python, except those of signal handlers.

    A handler that runs inside a callback, such as a fork hook of `logging`, cannot raise KeyboardInterrupt in the code
    below. While Ray starts, its own handler is installed, which raises SystemExit. `_listen` ends the process in both
    cases.
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(unraisable)


def _exit_process() -> None:
    """End the process before modules are unloaded, since library threads would print tracebacks then."""
    status = 1 if _state.status is None else _state.status  # None: an unexpected exception
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
