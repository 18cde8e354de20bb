"""Ctrl-C and SIGTERM end the process at once, even in the midst of a long compiled call.

Python runs signal handlers between bytecodes only, and one call of the device may take minutes.
But the interpreter's C code writes the number of each signal to the wake-up descriptor at once,
and a thread that reads from it can act. Nothing needs cleaning up: a run folder is always valid.
"""

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_until_the_end: list[Callable[[], None]] = []  # never called, and not to be collected
GO_ON = ("experiments.run", "experiments.frontier", "experiments.studies.readings")


@contextlib.contextmanager
def exit_at_once(last_words: Callable[[], None]) -> Iterator[None]:
    """On one of the signals, calls `last_words` in another thread and exits with `EXIT_CODE`.

    Outside of the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deaf_again = _listen(last_words)
    try:
        yield
    finally:
        deaf_again()


def _listen(last_words: Callable[[], None]) -> Callable[[], None]:
    """Begins at once; returns what puts everything back."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while signals := reader.recv(16):
            if any(number in signals for number in _SIGNALS):
                try:
                    last_words()
                finally:
                    os._exit(EXIT_CODE)

    # Without a Python handler the C code would write nothing. What is ignored stays so (`nohup`).
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()

    def put_back() -> None:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()

    return put_back


def from_the_start(command: Sequence[str]) -> None:
    """Until the process ends: one line that says how to go on, also while modules are imported.

    Args:
      command: `sys.orig_argv` of `python -m NAME …`.
    """
    name, *args = command[list(command).index("-m") + 1 :]
    line = f"{name}: interrupted"
    if name in GO_ON:
        line += f"; go on with: {shlex.join(['python', '-m', name, *args])}"

    def last_words() -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    _until_the_end.append(_listen(last_words))
