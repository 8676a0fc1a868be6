"""Cases that are a whole process: a script, started anew for every measurement."""

import subprocess
import sys

from . import Prepared

__all__ = ["DIGITS", "last_words", "script"]

# The digits as x and y, for a script that has no use for the rest of this library.
DIGITS = """
import importlib.util, pathlib
import numpy as np
digits = np.load(pathlib.Path(importlib.util.find_spec("gpubackprop").origin).parent / "data/digits.npz")
x, y = digits["x"].astype("float32") / 16, digits["y"].astype("int64")
"""


def last_words(said: str, status: int | None) -> str:
    """Why a process ended: the last line of what it said, else its exit status."""
    return said.strip().rpartition("\n")[2] or f"exit status {status}"


def script(text: str) -> Prepared:
    """A Python process that runs the text; RuntimeError with what it said if it fails."""

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(last_words(done.stderr, done.returncode))

    return Prepared(run, list)
