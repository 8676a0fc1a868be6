"""What a plan's launches must move at least, and a roofline model of a GPU: arithmetic on published figures."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpubackprop.backends.base import Launch
from gpubackprop.columns import Shown
from gpubackprop.formulas import LOSSES, RULES
from gpubackprop.plan import Plan

__all__ = ["FLOORS", "GPUS", "Gpu", "Traffic", "attained", "floor", "launches", "modelled", "roofline", "traffic"]


# ---- floors --------------------------------------------------------------------------------------------------------

# Arrays that must cross the memory bus, of as many elements as the launch has: an input read, an output written.
FLOORS: dict[str, int] = {
    "feed": 2,  # the data's rows, the batch
    "bias activation": 2,  # a, y: where the derivative needs the pre-activation, it can be found from a again
    "activation backward": 3,  # dy, y, da; the bias gradient is small
    "softmax_cross_entropy": 2,  # logits, their gradient
    **dict.fromkeys(("sse", *LOSSES), 3),  # output, target, the output's gradient
    "dropout": 2,  # the mask is drawn again, not kept
    "noise": 2,
    "normalize": 2,
    "normalize_backward": 3,  # dy, x, dx; x̂ is computed again
    "gradient norm": 1,
    # p, g and each moment read, p and each moment written
    **{rule.name: 3 + 2 * len(rule.state) for rule in RULES.values()},
}


def floor(launch: Launch) -> int:
    """The fewest bytes that what the launch computes must move; its own operands' where FLOORS does not have it."""
    if (arrays := FLOORS.get(launch.name)) is None:
        return launch.bytes
    main = max(launch.writes, key=lambda b: (b.size, b.dtype.itemsize))
    if launch.name == "feed":  # from the data's type to the batch's
        return int(launch.reads[0].nbytes + main.nbytes)
    if launch.name == "gradient norm" or (launch.name == "activation backward" and main.size < launch.reads[0].size):
        return int(launch.reads[0].nbytes)  # sums alone
    copies = [b for b in launch.writes if launch.name in RULES and b.size == main.size and b.dtype != main.dtype]
    return int(arrays * main.nbytes + sum(b.nbytes for b in copies))


@dataclass(frozen=True, repr=False)
class Traffic(Shown):
    """Bytes that launches move, and the fewest they could."""

    bytes: int
    floor: int

    @property
    def ratio(self) -> float:
        """How many times the fewest; 1 where nothing need move."""
        return self.bytes / self.floor if self.floor else 1.0

    def parts(self) -> list[str]:
        return [f"{self.bytes:,} bytes, {self.ratio:.2f} of the least"]


def traffic(plan: Plan) -> dict[str, Traffic]:
    """What the plan moves beside its products: in the optimizer, whose ahead-of-the-step part need not be a pass of its
    own, and in all other launches."""
    before = {id(launch) for launch in plan.sections.get("before", ())}
    parts: dict[str, list[Launch]] = {"elementwise": [], "optimizer": []}
    for launch in plan.launches:
        if launch.name != "gemm":
            parts["optimizer" if launch.name in RULES else "elementwise"].append(launch)
    return {
        part: Traffic(sum(n.bytes for n in found), sum(floor(n) for n in found if id(n) not in before))
        for part, found in parts.items()
    }


def launches(plan: Plan) -> int:
    """How often one replay asks the device for something: a launch that works in two passes counts twice."""
    return sum(len(getattr(launch.run, "calls", (launch,))) for launch in plan.launches)


# ---- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Published peaks: memory in GB/s; dense products in TFLOP/s, those of 16-bit operands summed in float32."""

    name: str
    bandwidth: float
    float64: float
    float32: float
    tf32: float
    float16: float
    bfloat16: float
    lacks: tuple[str, ...] = ()  # precisions it has no units for: at the rate of float32

    def rate(self, precision: str) -> float:
        """FLOP/s of products in that precision."""
        peak: float = getattr(self, precision)
        return peak * 1e12


GPUS = {
    # NVIDIA Turing architecture whitepaper and T4 data sheet
    "t4": Gpu("NVIDIA T4", 320, 0.25, 8.1, 8.1, 65, 8.1, lacks=("tf32", "bfloat16")),
    # NVIDIA A100 data sheet, SXM with 80 GB; float64 on tensor cores
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 2039, 19.5, 19.5, 156, 312, 312),
    # NVIDIA L4 data sheet, whose tensor figures are with sparsity: halved
    "l4": Gpu("NVIDIA L4", 300, 0.47, 30.3, 60, 121, 121),
    # NVIDIA Ada GPU architecture whitepaper, table of the RTX 4090
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 1008, 1.29, 82.6, 82.6, 165.2, 165.2),
    # NVIDIA H100 Tensor Core GPU architecture whitepaper, SXM5; float64 on tensor cores
    "h100": Gpu("NVIDIA H100 SXM", 3350, 66.9, 66.9, 494.7, 989.4, 989.4),
    # NVIDIA Blackwell architecture technical brief, HGX B200, whose tensor figures are with sparsity: halved
    "b200": Gpu("NVIDIA B200 SXM", 8000, 40, 80, 1100, 2250, 2250),
}


def modelled(plan: Plan, gpu: Gpu, precision: str) -> list[tuple[Launch, float, str]]:
    """Each launch with the seconds that the peaks alone allow, and what bounds it: its flops or its bytes."""
    found = []
    for launch in plan.launches:
        arithmetic = launch.flops / gpu.rate(precision if launch.name == "gemm" else _arithmetic(launch.writes))
        memory = launch.bytes / (gpu.bandwidth * 1e9)
        found.append((launch, max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"))
    return found


def attained(plan: Plan, gpu: Gpu, precision: str) -> list[tuple[Launch, float, float]]:
    """Each launch that has operations, how many it has per byte it moves, and how many a second the peaks allow."""
    found = ((launch, seconds) for launch, seconds, _ in modelled(plan, gpu, precision) if launch.flops)
    return [(launch, launch.flops / launch.bytes, launch.flops / seconds) for launch, seconds in found]


def roofline(plan: Plan, gpu: Gpu, precision: str) -> str:
    """The launches with the time that the peaks alone allow: the longer of moving their bytes and doing their flops."""
    found = modelled(plan, gpu, precision)
    rows = [f"{n.layer:<8}  {n.name:<24}  {1e6 * seconds:12.3f}  {bound}" for n, seconds, bound in found]
    lacks = f" at the rate of float32, for want of {precision} units" if precision in gpu.lacks else ""
    return "\n".join([
        f"roofline MODEL of one {gpu.name}, not a measurement: by its published peaks, {gpu.bandwidth:,g} GB/s for "
        f"what each launch reads and writes, {gpu.rate(precision) / 1e12:,g} TFLOP/s in {precision} products{lacks}; "
        "the cost of launching is left out",
        f"{'layer':<8}  {'launch':<24}  {'model, µs':>12}  bound by", *rows,
        f"{'':<8}  {'the step':<24}  {1e6 * sum(seconds for _, seconds, _ in found):12.3f}",
    ])  # fmt: skip


def _arithmetic(buffers: Iterable[object]) -> str:
    """The type that a launch computes in, by what it writes."""
    float64 = any(getattr(b, "dtype", None) == np.float64 for b in buffers)
    return "float64" if float64 else "float32"
