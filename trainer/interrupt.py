"""Ctrl-C and SIGTERM while a run trains."""

import signal
import sys
import time


class Interrupt:
    """Ctrl-C and SIGTERM ask for an orderly end; a second one ends at once."""

    def __init__(self):
        self.asked, self.when = False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # torchrun passes on to its processes a Ctrl-C that the terminal has already sent them: that is one, not two.
        if self.asked and time.monotonic() - self.when > 1:
            sys.exit(128 + number)
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
