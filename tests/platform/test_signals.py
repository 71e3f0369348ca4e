"""Signals interrupt guarded code wherever in Python they arrive."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import os, signal, time
from linflab.platform import signals

class Sent:
    def __set_name__(self, owner, name):  # as for any class that an import defines
        os.kill(os.getpid(), signal.{name})
        time.sleep(10)

signals.watch()
try:
    with signals.guarded():
        class Owner:
            sent = Sent()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_interrupt_a_class_definition(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(name=name)], text=True, capture_output=True, timeout=60)
    assert done.stdout == "interrupted\n", done.stderr


IN_FORK_HOOK = """
import os, signal, sys, time
from linflab.platform import signals

signals.GRACE_S = 1.0
signals.watch()
handler = {handler}
if handler is not None:
    signal.signal(signal.SIGTERM, handler)
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
with signals.guarded("resume"):
    if os.fork() == 0:
        os._exit(0)
    time.sleep(30)
"""


@pytest.mark.parametrize("handler", ["None", "lambda number, frame: sys.exit(number)"], ids=["own", "Ray's"])
def test_signals_in_a_callback_end_the_process(handler: str) -> None:
    """Python drops exceptions from callbacks; the process ends nevertheless, with its one line."""
    code = IN_FORK_HOOK.format(handler=handler)
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=25)
    assert (done.returncode, done.stderr) == (130, "linflab: interrupted; resume\n")


BEFORE_THE_THREAD = """
import os, signal, sys, time
from linflab.platform import signals

signals.watch()
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
sys.setswitchinterval(20)  # the signal thread waits until the main thread blocks
try:
    with signals.guarded("resume"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
except SystemExit:
    sys.stderr.write("interrupted; resume\\n")
    time.sleep(1)
    signals.command_ended(130)
"""


def test_signals_are_reported_once_when_a_library_handles_them_first() -> None:
    """Ray's handler raises SystemExit, and the main thread may report it before the signal thread has woken up."""
    done = subprocess.run([sys.executable, "-c", BEFORE_THE_THREAD], text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted; resume\n")
