"""A case taken by every contender in turn, each in a process of its own; what they computed is compared first."""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .cases import Case
from .measure import median_and_spread
from .peers import PEERS, Peer
from .peers.processes import last_words

__all__ = ["Contender", "Figures", "contenders", "disagreement", "measure"]

# until this process is gone, however it went
BUSY = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(10**6): pass
"""
PAUSE = 0.05  # seconds that a process's threads get to go to sleep before the next one is timed


@dataclass(frozen=True)
class Contender:
    """A peer, and which variant of it."""

    peer: Peer
    variant: str

    def __str__(self) -> str:
        return " ".join((self.peer.name, self.variant)).strip()


def contenders(peers: Iterable[str], backends: Sequence[str]) -> list[Contender]:
    """This library on each backend, the floors, and the named peers: `torch`, or `torch:eager` for one variant.

    ValueError for a name that is none.
    """
    own = {"gpubackprop": tuple(dict.fromkeys(backends)), "products": tuple(backends[:1])}
    found = [Contender(PEERS[name], variant) for name, variants in own.items() for variant in variants]
    for wanted in ("numpy", *peers):
        name, _, variant = wanted.partition(":")
        if name in own or name not in PEERS or variant not in ("", *PEERS[name].variants):
            known = [w for n, p in PEERS.items() if n not in own for w in (n, *(f"{n}:{v}" for v in p.variants if v))]
            raise ValueError(f"no peer {wanted!r}; choose from {', '.join(known)}")
        variants = [v for v in PEERS[name].variants if variant in ("", v)]
        found += [c for v in variants if (c := Contender(PEERS[name], v)) not in found]
    return found


@dataclass
class Figures:
    """What a contender took for a case, in seconds for each of the case's units; why not, if it took nothing."""

    case: str
    group: str
    unit: str
    contender: str
    flops: int
    bytes: int
    versions: str = ""
    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)  # between CUDA events
    memory: int = 0  # growth of the process's peak since the import
    check: list[float] = field(default_factory=list)
    absent: str = ""

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return median_and_spread(self.seconds)[0]

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        return median_and_spread(self.seconds)[1]

    def record(self) -> dict[str, Any]:
        """As it goes to a file."""
        return asdict(self) | ({"median": self.median, "spread": self.spread} if self.seconds else {})

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Figures":
        """From such a record; ValueError if it is none."""
        if not isinstance(record, dict):
            raise ValueError("a record is no object")
        found = cls(**{k: v for k, v in record.items() if k not in ("median", "spread")})
        texts = (found.case, found.group, found.unit, found.contender, found.versions, found.absent)
        if not all(isinstance(text, str) for text in texts) or Path(found.group).name != found.group:
            raise ValueError("a name is no text")
        for numbers, least in (([found.flops, found.bytes, found.memory], 0), (found.seconds, 1e-15),
                               (found.device_seconds, 1e-15), (found.check, -math.inf)):  # fmt: skip
            if not isinstance(numbers, list) or not all(_is_number(n, least) for n in numbers):
                raise ValueError("a figure is no number, or not one that can be measured")
        return found


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < 1e30


class _Process:
    """The worker of a contender."""

    def __init__(self, contender: Contender, case: Case, smoke: bool) -> None:
        arguments = contender.peer.name, contender.variant, case.name, "smoke" if smoke else "full"
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", *arguments], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, cwd=Path(__file__).parent.parent
            if __package__ == "benchmarks" else None,
        )  # fmt: skip

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._said.close()

    def answer(self) -> dict[str, Any]:
        """The next line; ChildProcessError with the process's last words if it has died."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._said.seek(0)
        raise ChildProcessError(last_words(self._said.read(), self._process.returncode))

    def begin(self) -> None:
        """Take a measurement, which is the next answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write("go\n")


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Inside, so many processes do nothing but run, each in a session of its own: some systems share cores by group."""
    command = [sys.executable, "-c", BUSY]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) for _ in range(processes)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def measure(case: Case, among: Iterable[Contender], repeats: int, *, smoke: bool = False) -> list[Figures]:
    """The figures of all contenders that can do the case, or why there are none; every round takes them in turn."""
    found: list[Figures] = []
    running: list[tuple[Figures, list[_Process], int]] = []
    size, name = (case.smoke(), f"{case.name}, smoke") if smoke else (case, case.name)
    with ExitStack() as stack:
        for contender in among:
            if not contender.peer.does(contender.variant, case):
                continue
            figures = Figures(name, case.group, case.unit, str(contender), size.flops, size.bytes)
            found.append(figures)
            if missing := contender.peer.missing:
                figures.absent = f"not installed: {missing}"
                continue
            processes = [stack.enter_context(_Process(contender, case, smoke)) for _ in range(case.at_once)]
            with _noted(figures):
                first, *_ = [process.answer() for process in processes]
                if "cannot" in first:
                    found.remove(figures)
                    continue
                figures.versions, figures.check = first["versions"], first["check"]
                running.append((figures, processes, first["units"]))
        for _ in range(repeats):
            for figures, processes, units in running:
                if figures.absent:
                    continue
                time.sleep(PAUSE)
                with _noted(figures), busy(case.beside):
                    for process in processes:
                        process.begin()
                    answer = max((process.answer() for process in processes), key=lambda a: float(a["seconds"]))
                    figures.memory = answer["memory"]
                    figures.seconds.append(answer["seconds"] / units)
                    if "device_seconds" in answer:
                        figures.device_seconds.append(answer["device_seconds"] / units)
    return found


@contextmanager
def _noted(figures: Figures) -> Iterator[None]:
    """A process that dies inside has no figures, and its last words are why."""
    try:
        yield
    except ChildProcessError as error:
        figures.absent = f"failed: {error}"
        figures.seconds.clear()


def disagreement(case: Case, found: Sequence[Figures]) -> Iterator[str]:
    """Whose numbers are not those of the first that has some, by the case's tolerance."""
    checked = [f for f in found if f.check]
    for other in checked[1:]:
        first = checked[0]
        a, b = np.array(first.check), np.array(other.check)
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=case.rtol * np.abs(a).max()):
            worst = f"{np.abs(a - b).max():.3g}" if a.shape == b.shape else f"{a.shape} against {b.shape}"
            yield f"{case.name}: {other.contender} does not compute what {first.contender} does (apart by {worst})"
