"""Theoretical occupancy: of a multiprocessor's warps, those that registers and shared memory leave room for.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Granularities and the arithmetic:
cuda_occupancy.h of the CUDA runtime, which the tests compile and compare with.
"""

from dataclasses import dataclass

__all__ = ["MULTIPROCESSORS", "Multiprocessor", "occupancy"]

WARP = 32
PARTITIONS = 4  # of a multiprocessor: each has a quarter of the registers, and warps of its own
REGISTERS = 65_536
REGISTER_STEP = 256  # registers are given to a warp in steps of this many


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor holds at most, and how it gives out shared memory (bytes)."""

    warps: int
    blocks: int
    shared: int
    shared_step: int = 128
    shared_reserved: int = 1024  # the driver's own in every block


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(32, 16, 64 << 10, shared_step=256, shared_reserved=0),
    "sm_80": Multiprocessor(64, 32, 164 << 10),
    "sm_86": Multiprocessor(48, 16, 100 << 10),
    "sm_89": Multiprocessor(48, 24, 100 << 10),
    "sm_90": Multiprocessor(64, 32, 228 << 10),
    "sm_100": Multiprocessor(64, 32, 228 << 10),
    "sm_120": Multiprocessor(48, 24, 100 << 10),
}


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps over the most there can be, for blocks of so many threads, 0 if a block does not fit.

    Registers are per thread, static shared memory is in bytes per block.
    """
    sm = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    limits = [sm.blocks, sm.warps // warps]
    if registers:
        of_warp = -(-registers * WARP // REGISTER_STEP) * REGISTER_STEP
        limits.append(REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps)
        if of_warp * -(-warps // PARTITIONS) * PARTITIONS > REGISTERS:
            return 0.0
    if taken := -(-(shared + sm.shared_reserved) // sm.shared_step) * sm.shared_step:
        limits.append(sm.shared // taken)
    return min(limits) * warps / sm.warps
