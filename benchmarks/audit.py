"""What the compiled code of a kernel shows: registers, spills, occupancy, the widths of its accesses."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .cuda import Function, Instruction
from .occupancy import occupancy

__all__ = ["Accesses", "Facts", "measure", "natural_loops"]

GLOBAL = re.compile(r"(LDG?|STG?)\.")  # generic accesses too: they may be global
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*(\.F64\b|64H\b)")
ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED|REDG|REDS)\.")
OF_FLOATS = re.compile(r".*\.(B?F(16|32|64)|CAST?\b)")  # compare-and-swap in a loop adds floats where no opcode does
FENCE = re.compile(r"MEMBAR\.(.+\.)?(GPU|SYS)\b")
TICKET = re.compile(r"ATOMG?\.\S+ (?!PT,RZ,)")  # an atomic whose value is used
ADDRESS = re.compile(r"\[(R\w+)(?:\.\w+)?(?:\+(UR\d+))?(?:\+(-?0x[0-9a-f]+))?\]")

Accesses = tuple[int, ...]  # widths in bits, one for each instruction


@dataclass(frozen=True)
class Facts:
    """A kernel as compiled for one architecture. Widths are of accesses to global memory.

    The main loop is the innermost loop with the widest accesses; its widths are () where there is none.
    """

    registers: int
    occupancy: int  # percent, at the most threads a block may have
    shared: int  # bytes, static
    local: int  # bytes a thread: spills and arrays that do not stay in registers
    spills: tuple[int, int]  # stores to and loads from local memory
    double: int  # instructions of 64-bit arithmetic
    float_atomics: int
    integer_atomics: int
    loads: Accesses
    stores: Accesses
    loop_loads: Accesses
    loop_stores: Accesses
    unfenced: tuple[int, int]  # stores with a ticket after them, loads after a ticket, and no fence on a path between
    split: int  # narrow accesses of the main loop side by side, where others are wide: vectors that the compiler split


def measure(function: Function, architecture: str, threads: int) -> Facts:
    """The facts of a kernel that is launched with up to so many threads in a block."""
    code = function.code
    opcodes = [i.opcode for i in code]
    places = _main_loop(code)
    loop = [code[i] for i in places]
    atomics = [o for o in opcodes if ATOMIC.match(o)]
    floats = sum(bool(OF_FLOATS.match(o)) for o in atomics)
    return Facts(
        registers=function.registers,
        occupancy=round(100 * occupancy(architecture, threads, function.registers, function.shared)),
        shared=function.shared,
        local=function.local,
        spills=(sum(o.startswith("STL") for o in opcodes), sum(o.startswith("LDL") for o in opcodes)),
        double=sum(bool(DOUBLE.match(o)) for o in opcodes),
        float_atomics=floats,
        integer_atomics=len(atomics) - floats,
        loads=_widths(code, "LD"),
        stores=_widths(code, "ST"),
        loop_loads=_widths(loop, "LD"),
        loop_stores=_widths(loop, "ST"),
        unfenced=_unfenced(code),
        split=sum(map(_split, _blocks(code, places))),
    )


# ---- accesses ------------------------------------------------------------------------------------------------------


def _widths(code: Iterable[Instruction], kind: str) -> Accesses:
    accesses = (i.opcode for i in code if i.opcode.startswith(kind) and GLOBAL.match(i.opcode))
    return tuple(sorted(map(_width, accesses), reverse=True))


def _width(opcode: str) -> int:
    """Bits that one thread moves: LDG.E.128.CONSTANT 128, STG.E.U16 16, LDG.E 32."""
    match = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(match[1]) if match else 32


def _split(block: Sequence[Instruction]) -> int:
    """Accesses below 16 bytes side by side in memory, in straight-line code that has accesses of 16 bytes too.

    Those with another predicate are another arm: a fallback for addresses off the boundary is meant to be narrow.
    """
    places: dict[tuple[str, ...], dict[int, int]] = {}  # of an arm, loads or stores, a register: the width at an offset
    for i in block:
        if GLOBAL.match(i.opcode) and (address := ADDRESS.search(i.operands)):
            register, uniform, offset = address.groups("0")
            places.setdefault((i.predicate, i.opcode[:2], register, uniform), {})[int(offset, 16)] = _width(i.opcode)
    with_vectors = {arm for (arm, *_), widths in places.items() if max(widths.values()) >= 128}
    narrow = (
        {o: w // 8 for o, w in widths.items() if w < 128} for (arm, *_), widths in places.items() if arm in with_vectors
    )
    return sum(o + size in sizes or o - size in sizes for sizes in narrow for o, size in sizes.items())


def _main_loop(code: Sequence[Instruction]) -> list[int]:
    """Of the loops that access global memory and hold no smaller one, that with the widest accesses, and most."""
    touching = [loop for loop in natural_loops(code) if any(GLOBAL.match(code[i].opcode) for i in loop)]
    innermost = [sorted(loop) for loop in touching if not any(other < loop for other in touching)]

    def rank(loop: Sequence[int]) -> tuple[int, int, int]:
        widths = [w for kind in ("LD", "ST") for w in _widths((code[i] for i in loop), kind)]
        return max(widths), min(widths), sum(widths)

    return max(innermost, key=rank, default=[])


# ---- order of memory -----------------------------------------------------------------------------------------------


def _unfenced(code: Sequence[Instruction]) -> tuple[int, int]:
    """Stores that other blocks may see later than the ticket, and loads that may see what was before theirs.

    A load of what no thread writes (CONSTANT) need not wait.
    """
    fences = {i for i, c in enumerate(code) if FENCE.match(c.opcode)}
    following = [list(_successors(code, i)) for i in range(len(code))]
    preceding: list[list[int]] = [[] for _ in code]
    for i, others in enumerate(following):
        for j in others:
            preceding[j].append(i)

    def near(steps: Sequence[Sequence[int]], kind: str) -> int:
        reached = set[int]()
        waiting = [j for i, c in enumerate(code) if TICKET.match(f"{c.opcode} {c.operands}") for j in steps[i]]
        while waiting:
            if (i := waiting.pop()) not in reached and i not in fences:
                reached.add(i)
                waiting += steps[i]
        found = [code[i].opcode for i in reached if GLOBAL.match(code[i].opcode)]
        return sum(opcode.startswith(kind) and ".CONSTANT" not in opcode for opcode in found)

    return near(preceding, "ST"), near(following, "LD")


# ---- control flow --------------------------------------------------------------------------------------------------


def natural_loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """The loops, each as the places of its instructions; those of one head are one loop.

    What branches back to a block that every path to it passes through. A branch alone does not make a loop: slow
    paths stand behind the code that they return to.
    """
    succeeding = [list(_successors(code, i)) for i in range(len(code))]
    preceding: list[list[int]] = [[] for _ in code]
    backward: list[tuple[int, int]] = []
    entered, left = {0}, set[int]()
    path = [(0, iter(succeeding[0]))]
    while path:
        i, rest = path[-1]
        j = next(rest, None)
        if j is None:
            left.add(i)
            path.pop()
            continue
        preceding[j].append(i)
        if j not in entered:
            entered.add(j)
            path.append((j, iter(succeeding[j])))
        elif j not in left:
            backward.append((i, j))
    loops: dict[int, set[int]] = {}
    for tail, head in backward:
        loop = loops.setdefault(head, {head})
        waiting = [tail]
        while waiting:
            if (i := waiting.pop()) not in loop:
                loop.add(i)
                waiting += preceding[i]
    return [frozenset(loop) for loop in loops.values()]


def _blocks(code: Sequence[Instruction], places: Sequence[int]) -> Iterator[list[Instruction]]:
    """The runs of straight-line code among these places."""
    joined = {j for i in range(len(code)) for j in _successors(code, i) if j != i + 1}
    block: list[int] = []
    for i in places:
        if block and (i in joined or list(_successors(code, block[-1])) != [i]):
            yield [code[j] for j in block]
            block = []
        block.append(i)
    yield [code[j] for j in block]


def _successors(code: Sequence[Instruction], i: int) -> Iterator[int]:
    """Where execution may go after instruction i. A call comes back; convergence barriers go on with the next."""
    predicate, opcode, operands = code[i]
    kind = opcode.partition(".")[0]
    goes_on = bool(predicate) or kind not in ("BRA", "JMP", "EXIT", "RET")
    if kind in ("BRA", "JMP"):
        *conditions, target = operands.split(",")
        goes_on |= bool(conditions)
        yield int(target)
    if goes_on and i + 1 < len(code):
        yield i + 1
