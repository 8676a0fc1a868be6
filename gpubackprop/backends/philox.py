"""Random numbers as a pure function of (seed, site, step, element): Philox 4x32-10, here for NumPy.

Element e of a site (e = global row * columns + column) reads word e % 4 of the block whose counter is
(low32(e // 4), high32(e // 4), step, site) and whose key is (low32(seed), high32(seed)). Nothing is carried
from one draw to the next, so any split of the elements over chunks, ranks or backends draws the same numbers.
Sites stay below 2^30: the two bits above name the lane where one element needs more than 32 bits.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ROUNDS = 10
M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # key increments
MASK = 0xFFFFFFFF

LOW, SECOND = 1 << 31, 1 << 30  # lanes: the low word of a float64 uniform; the second uniform of a normal
CHUNK = 16_384  # blocks at a time: at 48 bytes of scratch each they stay in a second-level cache of 1 MB

Words = NDArray[np.uint32]
Longs = NDArray[np.uint64]
Floats = NDArray[Any]  # float32 or float64


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """counter (4, n) -> words (4, n)  (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3")."""
    x0, x1, x2, x3 = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = x0 * M0, x2 * M1
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & MASK, (p0 >> 32) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


@lru_cache(maxsize=1024)
def _round_keys(seed: int) -> list[tuple[np.uint64, np.uint64]]:
    """For every second round, what to xor into the products p0 and p1: its key above the next round's."""
    k0, k1 = ([(k + r * w) & MASK for r in range(ROUNDS)] for k, w in ((seed, W0), (seed >> 32, W1)))
    return [(np.uint64(k1[r] << 32 | k1[r + 1]), np.uint64(k0[r] << 32 | k0[r + 1])) for r in range(0, ROUNDS, 2)]


class _Rounds:
    """The ten rounds over m consecutive blocks, without allocation: 3.5 passes over (2, m) uint64 a round.

    A product p is hi(p) << 32 | lo(p), and the next word is hi(p) ^ lo(older p) ^ key. Reading the older
    product's buffer one uint32 further left puts its low halves under the new high halves, so one xor and one
    shift leave the clean word. Every second round xors in two round keys: into hi(p), used now, and into
    lo(p), used next. Little-endian only.
    """

    def __init__(self, m: int) -> None:
        self._index: Longs = np.arange(m, dtype=np.uint64)
        self._x: Longs = np.empty((2, m), np.uint64)  # (x2, x0): the order of the products that make them
        # p0, p1, both as words, both as words read one further left; this round's and the older one's
        self._products: list[tuple[Longs, Longs, Words, Words]] = []
        for _ in range(2):
            buffer: Longs = np.zeros(1 + 2 * m, np.uint64)  # the first is what lies left of p0
            words = buffer.view(np.uint32)
            self._products.append((buffer[1 : 1 + m], buffer[1 + m :], words[2:], words[1:-1]))

        # 0-d arrays, because a Python int would be range-checked and converted at each call.
        self._m0, self._m1, self._32, self._low = (np.array(v, np.uint64) for v in (M0, M1, 32, MASK))

    def __call__(self, first: int, seed: int, site: int, step: int, out: Longs) -> None:
        """out (m, 2) = words (x0, x1), (x2, x3) of blocks first … first + m - 1, two words to a uint64."""
        x, m0, m1, shift = self._x, self._m0, self._m1, self._32
        x2, x0 = x
        x_words = x.reshape(-1).view(np.uint32)
        new, old = self._products
        x3, x1, _, _ = old
        np.add(self._index, np.uint64(first), x0)
        np.right_shift(x0, shift, x1)
        np.bitwise_and(x0, self._low, x0)
        x2.fill(step & MASK)
        x3.fill(site & MASK)
        for key0, key1 in _round_keys(seed):
            for keyed in (True, False):
                p0, p1, p_words, _ = new
                np.multiply(x0, m0, p0)
                np.multiply(x2, m1, p1)
                if keyed:
                    np.bitwise_xor(p0, key0, p0)
                    np.bitwise_xor(p1, key1, p1)
                np.bitwise_xor(p_words, old[3], x_words)
                np.right_shift(x, shift, x)
                new, old = old, new
        for word, above, column in ((x0, old[1], out[:, 0]), (x2, old[0], out[:, 1])):
            np.left_shift(above, shift, above)
            np.bitwise_or(word, above, column)


class Draws:
    """The draws of elements start … start + n - 1, without allocation: a result lives until the next call.

    What is returned is a view of a buffer that the next call on this object overwrites. `dtype` (float32 or
    float64) is that of `uniform` and `normal`; seed, site (below 2^30) and step are integers.
    """

    def __init__(self, n: int, dtype: DTypeLike = np.float32, start: int = 0) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"Draws: dtype is {self.dtype}, expected float32 or float64")
        first, offset = divmod(start, 4)
        blocks = -(-(offset + n) // 4)
        # A page of np.empty is committed when first written: a method that is never called costs no memory.
        packed: Longs = np.empty((blocks, 2), np.uint64)
        self._bits: Words = packed.reshape(-1).view(np.uint32)[offset : offset + n]
        self._mask = np.empty(n, np.bool_)
        self._values: Floats = np.empty(n, self.dtype)
        self._angles: Floats = np.empty(n, self.dtype)
        self._pairs: Longs = np.empty(n if self.dtype == np.float64 else 0, np.uint64)
        starts = range(0, blocks, CHUNK)
        rounds = {m: _Rounds(m) for m in {min(CHUNK, blocks - i) for i in starts}}
        outs = [packed[i : i + CHUNK] for i in starts]
        self._chunks = [(rounds[len(out)], first + i, out) for i, out in zip(starts, outs, strict=True)]

    def bits(self, seed: int, site: int, step: int) -> Words:
        """One uint32 for each element."""
        for rounds, first, out in self._chunks:
            rounds(first, seed, site, step, out)
        return self._bits

    def bernoulli(self, p: float, seed: int, site: int, step: int) -> NDArray[np.bool_]:
        """bits < round(p · 2^32): True with probability p, by integers, so that every backend agrees."""
        threshold = round(float(p) * 2**32)
        if threshold > MASK:  # above every word, and no uint32 itself
            self._mask.fill(True)
            return self._mask
        return np.less(self.bits(seed, site, step), threshold, out=self._mask)

    def uniform(self, seed: int, site: int, step: int) -> Floats:
        """k / 2^24 or k / 2^53 in [0, 1), by dtype; the float32 draw is the float64 draw cut short."""
        return self._uniform(seed, site, step, self._values)

    def normal(self, seed: int, site: int, step: int) -> Floats:
        """√(-2 ln(1 - u)) · cos(2π v)  (Box and Muller), u and v being the element's own.

        1 - u is in (0, 1], so every draw is finite: within ±5.8 for float32 and ±8.6 for float64. Each backend
        computes it from the same u and the same rounded 2π v, within 4 ulp.
        """
        u = self._uniform(seed, site, step, self._values)
        v = self._uniform(seed, site | SECOND, step, self._angles)
        np.subtract(1, u, u)
        np.log(u, u)
        np.multiply(u, -2, u)
        np.sqrt(u, u)
        np.multiply(v, 2 * np.pi, v)
        np.cos(v, v)
        np.multiply(u, v, u)
        return u

    def _uniform(self, seed: int, site: int, step: int, out: Floats) -> Floats:
        bits = self.bits(seed, site, step)
        if self.dtype == np.float32:
            np.right_shift(bits, 8, bits)
            np.copyto(out, bits.view(np.int32), casting="unsafe")  # int32 converts faster than uint32
            np.multiply(out, 2.0**-24, out)
        else:
            halves = self._pairs.view(np.uint32)
            halves[1::2] = bits
            halves[::2] = self.bits(seed, site | LOW, step)
            np.right_shift(self._pairs, 11, self._pairs)
            np.copyto(out, self._pairs.view(np.int64))  # and int64 faster than uint64
            np.multiply(out, 2.0**-53, out)
        return out
