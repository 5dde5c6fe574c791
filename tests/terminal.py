"""A script in a pseudo-terminal, as a user meets it at the keyboard. Windows has none."""

import os
import select
import signal
import sys
import time


class Terminal:
    """A script that runs in a pseudo-terminal."""

    def __init__(self, *arguments):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # A shell's background jobs may have ignored SIGINT, which children inherit.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            environment = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
            os.execve(sys.executable, [sys.executable, *map(str, arguments)], environment)

    def read(self, end="> ", timeout=60):
        """Return what it shows up to `end` or, if that is None, to the end of the process."""
        shown = ""
        deadline = time.monotonic() + timeout
        while end is None or not shown.endswith(end):
            left = max(0, deadline - time.monotonic())
            assert select.select([self.fd], [], [], left)[0], shown
            try:
                new = os.read(self.fd, 4096).decode()
            except OSError:  # Linux's way to say that the other side is closed
                new = ""
            assert new or end is None, shown
            if not new:
                break
            shown += new
        return shown.replace("\r\n", "\n")

    def type(self, text):
        """Send a text at once, as pasting does."""
        os.write(self.fd, text.replace("\n", "\r").encode())

    def say(self, line):
        """Type a line; return what is shown between its echo and the next prompt."""
        self.type(f"{line}\n")
        return self.read().partition("\n")[2].removesuffix("> ")

    def close(self):
        """Press Ctrl-D; return the exit status."""
        os.write(self.fd, b"\x04")
        self.read(None)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
