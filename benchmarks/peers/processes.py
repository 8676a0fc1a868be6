"""Cases that are a whole process: a script, started anew for every measurement."""

import subprocess
import sys

from . import Prepared

__all__ = ["script"]


def script(text: str) -> Prepared:
    """A Python process that runs the text; RuntimeError with what it said if it fails."""

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
            )

    return Prepared(run, list)
