"""Random normals inside numba kernels: xoshiro256++ with Box-Muller or with a ziggurat.

numba's own `np.random.standard_normal` is a Mersenne twister with the polar method.
"""

import math

import numba
import numpy as np

LAYERS = 256
EDGE = 3.6541528853610088
"""Where the tail of the ziggurat with 256 layers begins."""


def ziggurat_tables() -> tuple[np.ndarray, np.ndarray]:
    """Right edges of the layers, and the fraction of each that lies under the next one.

    **Source:** Doornik, "An improved ziggurat method to generate normal random samples", 2005.
    """
    height = math.exp(-0.5 * EDGE**2)
    tail = math.sqrt(math.pi / 2.0) * math.erfc(EDGE / math.sqrt(2.0))
    area = EDGE * height + tail
    edges = np.zeros(LAYERS + 1)
    edges[0], edges[1] = area / height, EDGE
    for i in range(2, LAYERS):
        edges[i] = math.sqrt(-2.0 * math.log(area / edges[i - 1] + height))
        height = math.exp(-0.5 * edges[i] ** 2)
    return edges, edges[1:] / edges[:-1]


EDGES, INSIDE = ziggurat_tables()
UNIT = 2.0**-53


@numba.njit(inline="always")
def rotated(x, k):
    return (x << np.uint64(k)) | (x >> np.uint64(64 - k))


@numba.njit(inline="always")
def word(s):
    """64 random bits; advances the state `s` of xoshiro256++ (Blackman, Vigna 2021)."""
    result = rotated(s[0] + s[3], 23) + s[0]
    t = s[1] << np.uint64(17)
    s[2] ^= s[0]
    s[3] ^= s[1]
    s[1] ^= s[2]
    s[0] ^= s[3]
    s[2] ^= t
    s[3] = rotated(s[3], 45)
    return result


@numba.njit(inline="always")
def uniform(s):
    """A number in (0, 1]."""
    return (np.float64(word(s) >> np.uint64(11)) + 1.0) * UNIT


@numba.njit
def seed(s, number):
    """The state of stream `number`, by splitmix64."""
    z = np.uint64(number)
    for i in range(4):
        z += np.uint64(0x9E3779B97F4A7C15)
        x = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        s[i] = x ^ (x >> np.uint64(31))


@numba.njit
def beyond(s, layer, u):
    """The rare part of the ziggurat: whether a number was found, and the number."""
    if layer == 0:
        while True:
            x = -math.log(uniform(s)) / EDGE
            if -2.0 * math.log(uniform(s)) > x * x:
                return True, -(EDGE + x) if u < 0.0 else EDGE + x
    x = u * EDGES[layer]
    lower = math.exp(-0.5 * (EDGES[layer] ** 2 - x * x))
    upper = math.exp(-0.5 * (EDGES[layer + 1] ** 2 - x * x))
    return upper + uniform(s) * (lower - upper) < 1.0, x


@numba.njit(inline="always")
def ziggurat(s):
    """A standard normal."""
    while True:
        bits = word(s)
        u = 2.0 * (np.float64(bits >> np.uint64(11)) * UNIT) - 1.0
        layer = bits & np.uint64(LAYERS - 1)
        if abs(u) < INSIDE[layer]:
            return u * EDGES[layer]
        found, x = beyond(s, layer, u)
        if found:
            return x


@numba.njit(inline="always")
def box_muller(s):
    """Two standard normals."""
    radius = math.sqrt(-2.0 * math.log(uniform(s)))
    angle = 2.0 * math.pi * uniform(s)
    return radius * math.cos(angle), radius * math.sin(angle)
