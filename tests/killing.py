"""What tests share that kill a command while it writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def kill_while_writing(arguments: Sequence[str], folder: Path, pattern: str) -> None:
    """Run a command in a process of its own and kill it in the middle of writing a file.

    Args:
        arguments: Of `blockloom`; so much to make that it is far from done.
        folder: Where it writes.
        pattern: Of the unfinished file that tells that writing has begun.
    """
    command = [sys.executable, "-m", "blockloom", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list(folder.glob(pattern)) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)  # in the middle of writing
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
