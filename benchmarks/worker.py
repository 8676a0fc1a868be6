"""A peer in a process of its own, spoken to in lines of JSON: `python -m benchmarks.worker PEER VARIANT CASE SIZE`.

It first says what it found: its versions, and the numbers to be checked; or that it cannot do the case. For every line
that it then reads it takes one measurement, and answers.
"""

import json
import os
import sys
from importlib import import_module

from .cases import CASES
from .measure import forget_peak, peak_memory, timed
from .peers import PEERS, prepare

__all__ = ["main"]


def main(peer: str, variant: str, name: str, size: str) -> None:
    """Serve until the other end closes; size is full or smoke."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    case = CASES[name].smoke() if size == "smoke" else CASES[name]
    import_module(f"{__package__}.peers.{peer}")
    forget_peak()
    imported = peak_memory()
    prepared = prepare(peer, variant, case)
    if prepared is None:
        print(json.dumps({"cannot": True}), file=replies)
        return
    check = prepared.check()
    prepared.run()
    print(json.dumps({"versions": PEERS[peer].versions, "units": prepared.units, "check": check}), file=replies)
    for _ in sys.stdin:
        taken = timed(prepared.run, variant)
        print(json.dumps({**taken, "memory": peak_memory() - imported}), file=replies)


if __name__ == "__main__":
    main(*sys.argv[1:])
