"""Label-noise training written by hand in numba, in parallel over the paths.

A step takes $A_i^T (a (P - T) + b\\, \\xi) B_i^T$ from layer i, with the scales (a, b) of SGD or
of Euler-Maruyama. Every path keeps a generator of its own.
"""

import numba
import numpy as np
from numba_normals import box_muller, seed, ziggurat

LANES = 16


@numba.njit(parallel=True, fastmath=True)
def scalar_mersenne(starts, target, a, b, steps):
    paths = starts.shape[1]
    ends = np.empty_like(starts)
    for p in numba.prange(paths):
        first, second = starts[0, p], starts[1, p]
        for _ in range(steps):
            m = a * (first * second - target) + b * np.random.standard_normal()
            first, second = first - m * second, second - m * first
        ends[0, p], ends[1, p] = first, second
    return ends


@numba.njit(parallel=True, fastmath=True)
def scalar_box_muller(starts, target, a, b, steps):
    paths = starts.shape[1]
    ends = np.empty_like(starts)
    for p in numba.prange(paths):
        s = np.empty(4, np.uint64)
        seed(s, p)
        first, second = starts[0, p], starts[1, p]
        for _ in range(steps // 2):
            x, y = box_muller(s)
            m = a * (first * second - target) + b * x
            first, second = first - m * second, second - m * first
            m = a * (first * second - target) + b * y
            first, second = first - m * second, second - m * first
        ends[0, p], ends[1, p] = first, second
    return ends


@numba.njit(parallel=True, fastmath=True)
def scalar_ziggurat(starts, target, a, b, steps):
    paths = starts.shape[1]
    ends = np.empty_like(starts)
    for p in numba.prange(paths):
        s = np.empty(4, np.uint64)
        seed(s, p)
        first, second = starts[0, p], starts[1, p]
        for _ in range(steps):
            m = a * (first * second - target) + b * ziggurat(s)
            first, second = first - m * second, second - m * first
        ends[0, p], ends[1, p] = first, second
    return ends


@numba.njit(fastmath=True, inline="always")
def multiply(x, y, out):
    """x y."""
    d = x.shape[0]
    for i in range(d):
        for j in range(d):
            out[i, j] = 0.0
        for k in range(d):
            for j in range(d):
                out[i, j] += x[i, k] * y[k, j]


@numba.njit(fastmath=True, inline="always")
def multiply_left_transposed(x, y, out):
    """x^T y."""
    d = x.shape[0]
    for i in range(d):
        for j in range(d):
            out[i, j] = 0.0
    for k in range(d):
        for i in range(d):
            for j in range(d):
                out[i, j] += x[k, i] * y[k, j]


@numba.njit(fastmath=True, inline="always")
def subtract_right_transposed(x, y, turned, out):
    """out -= x y^T."""
    d = x.shape[0]
    for i in range(d):
        for j in range(d):
            turned[i, j] = y[j, i]
    for i in range(d):
        for k in range(d):
            for j in range(d):
                out[i, j] -= x[i, k] * turned[k, j]


@numba.njit(parallel=True, fastmath=True)
def matrix_by_path(starts, target, a, b, steps):
    """Depth 3; `starts` is (paths, 3, d, d). One path after the other in a thread."""
    paths, _, d, _ = starts.shape
    ends = np.empty_like(starts)
    for p in numba.prange(paths):
        s = np.empty(4, np.uint64)
        seed(s, p)
        w = starts[p].copy()
        lower, product, m = np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
        left, turned, down = np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
        for _ in range(steps):
            multiply(w[1], w[0], lower)
            multiply(w[2], lower, product)
            for i in range(d):
                for j in range(d):
                    m[i, j] = a * (product[i, j] - target[i, j])
            if b != 0.0:
                for i in range(d):
                    for j in range(d):
                        m[i, j] += b * ziggurat(s)
            multiply_left_transposed(w[2], m, left)
            multiply_left_transposed(w[1], left, down)
            subtract_right_transposed(left, w[0], turned, w[1])
            subtract_right_transposed(m, lower, turned, w[2])
            for i in range(d):
                for j in range(d):
                    w[0, i, j] -= down[i, j]
        ends[p] = w
    return ends


@numba.njit(fastmath=True, inline="always")
def lanes_add(x, y, out, d, sign, turn_x, turn_y):
    """out += sign op(x) op(y) for LANES paths at once, path axis last."""
    for i in range(d):
        for k in range(d):
            u = x[k, i] if turn_x else x[i, k]
            for j in range(d):
                v = y[j, k] if turn_y else y[k, j]
                o = out[i, j]
                for q in range(LANES):
                    o[q] += sign * u[q] * v[q]


@numba.njit(parallel=True, fastmath=True)
def matrix_in_lanes(starts, target, a, b, steps):
    """The same with a vector of LANES paths in every operation."""
    paths, _, d, _ = starts.shape
    ends = np.empty_like(starts)
    for chunk in numba.prange(-(-paths // LANES)):
        begin = chunk * LANES
        count = min(LANES, paths - begin)
        s = np.empty(4, np.uint64)
        seed(s, chunk)
        w = np.zeros((3, d, d, LANES))
        for q in range(count):
            for layer in range(3):
                for i in range(d):
                    for j in range(d):
                        w[layer, i, j, q] = starts[begin + q, layer, i, j]
        lower, m = np.empty((d, d, LANES)), np.empty((d, d, LANES))
        left, down = np.empty((d, d, LANES)), np.empty((d, d, LANES))
        for _ in range(steps):
            lower[:] = 0.0
            lanes_add(w[1], w[0], lower, d, 1.0, False, False)
            for i in range(d):
                for j in range(d):
                    for q in range(LANES):
                        m[i, j, q] = -a * target[i, j]
            lanes_add(w[2], lower, m, d, a, False, False)
            if b != 0.0:
                for i in range(d):
                    for j in range(d):
                        for q in range(LANES):
                            m[i, j, q] += b * ziggurat(s)
            left[:] = 0.0
            lanes_add(w[2], m, left, d, 1.0, True, False)
            down[:] = 0.0
            lanes_add(w[1], left, down, d, 1.0, True, False)
            lanes_add(left, w[0], w[1], d, -1.0, False, True)
            lanes_add(m, lower, w[2], d, -1.0, False, True)
            for i in range(d):
                for j in range(d):
                    for q in range(LANES):
                        w[0, i, j, q] -= down[i, j, q]
        for q in range(count):
            for layer in range(3):
                for i in range(d):
                    for j in range(d):
                        ends[begin + q, layer, i, j] = w[layer, i, j, q]
    return ends
