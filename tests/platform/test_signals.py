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
