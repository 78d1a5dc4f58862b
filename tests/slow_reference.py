"""The slow drift of noisy descent along the minima manifold, from its definition, in plain NumPy.

Nothing here imports gradflow. Let F be one step of noise-free descent (of W, or of W and the
velocity v for a heavy ball) and Phi_h = lim F^k, the minimum that descent from rest reaches. As
Phi_h(F(w)) = Phi_h(w), a kick u of mean zero at a minimum moves Phi_h by D^2 Phi_h[u, u] / 2 on
average. Phi_h is expanded without any formula for its derivatives: `limit_expansion` composes the
expansion of F with itself until nothing changes, and `kicked_limit` runs descent in many digits.

Layers are lists of matrices, first layer first; flat vectors are those of `reference.flatten`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mpmath
import numpy as np
import reference
import scipy.linalg
from reference import Layers


def layers_of(vectors: np.ndarray, like: Layers) -> list[np.ndarray]:
    """The layers of flat vectors (last axis)."""
    pieces = np.split(vectors, np.cumsum([w.size for w in like])[:-1], axis=-1)
    return [v.reshape(*v.shape[:-1], *w.shape) for v, w in zip(pieces, like, strict=True)]


class Hyperdual:
    """a + b e1 + c e2 + d e1 e2 with e1^2 = e2^2 = 0, each part a stack of matrices."""

    __array_ufunc__ = None  # NumPy leaves `array @ hyperdual` to __rmatmul__

    def __init__(self, value, first, second, both):
        self.parts = (value, first, second, both)

    @property
    def shape(self):
        return self.parts[0].shape

    @property
    def T(self):
        return Hyperdual(*(np.swapaxes(p, -1, -2) for p in self.parts))

    def __matmul__(self, other):
        a, b, c, d = self.parts
        if not isinstance(other, Hyperdual):
            return Hyperdual(a @ other, b @ other, c @ other, d @ other)
        p, q, r, s = other.parts
        return Hyperdual(a @ p, a @ q + b @ p, a @ r + c @ p, a @ s + b @ r + c @ q + d @ p)

    def __rmatmul__(self, other):
        return Hyperdual(*(other @ p for p in self.parts))

    def __sub__(self, other):
        return Hyperdual(self.parts[0] - other, *self.parts[1:])


def derivatives(layers: Layers, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hessian `(n, n)` and third derivative `(n, n, n)` of the loss with minimum at the layers."""
    exact = [np.asarray(w, np.longdouble) for w in layers]
    n = sum(w.size for w in exact)
    units = np.eye(n, dtype=np.longdouble)
    moved = [
        Hyperdual(w, unit[:, None], unit[None], np.zeros_like(w))
        for w, unit in zip(exact, layers_of(units, exact), strict=True)
    ]
    gradients: list[Any] = reference.gradient(moved, s, reference.end_to_end(exact) @ s)
    parts = [g.parts for g in gradients]
    hessian = np.concatenate([p[1].reshape(n, -1) for p in parts], axis=1)
    wide = [np.broadcast_to(p[3], (n, n, *p[3].shape[-2:])) for p in parts]
    third = np.concatenate([p.reshape(n, n, -1) for p in wide], axis=2)
    return hessian, third


class Expansion(NamedTuple):
    """u -> linear u + quadratic[u, u] / 2 about a fixed point; `quadratic` is (out, in, in)."""

    linear: np.ndarray
    quadratic: np.ndarray

    def after(self, inner: "Expansion") -> "Expansion":
        """The expansion of self(inner(u))."""
        size = len(self.linear)
        a = inner.linear
        pushed = (self.linear @ inner.quadratic.reshape(size, -1)).reshape(size, size, size)
        return Expansion(self.linear @ a, pushed + a.T @ (self.quadratic @ a))


def step_expansion(layers: Layers, s: np.ndarray, h: float, beta: float = 0.0) -> Expansion:
    """One step of descent in the state (W, v): v+ = beta v - h grad L(W), W+ = W + v+."""
    hessian, third = derivatives(layers, s)
    n = len(hessian)
    one, size = np.eye(n, dtype=np.longdouble), np.longdouble(h)
    fall = -size * hessian
    linear = np.block([[one + fall, beta * one], [fall, beta * one]])
    quadratic = np.zeros((2 * n, 2 * n, 2 * n), np.longdouble)
    quadratic[:n, :n, :n] = quadratic[n:, :n, :n] = -size * np.moveaxis(third, 2, 0)
    return Expansion(linear, quadratic)


def limit_expansion(layers: Layers, s: np.ndarray, h: float, beta: float = 0.0) -> Expansion:
    """Phi_h about the layers: the step composed with itself, 2^k times, until nothing changes."""
    at = step_expansion(layers, s, h, beta)
    for _ in range(40):
        twice = at.after(at)
        change = max(float(np.abs(a - b).max()) for a, b in zip(twice, at, strict=True))
        at = twice
        if change < 1e-13 * max(1.0, float(np.abs(at.quadratic).max())):
            return at
    raise AssertionError("descent does not settle")


def kick_drift(
    layers: Layers, s: np.ndarray, columns: np.ndarray, h: float, beta: float = 0.0
) -> np.ndarray:
    """Mean displacement of Phi_h in one step with gradient noise sum_c zeta_c columns[c], `(n,)`.

    `columns` is `(c, n)`. The noise kicks W and v alike.
    """
    n = columns.shape[1]
    limit = limit_expansion(layers, s, h, beta)
    kicks = -h * np.concatenate([columns, columns], axis=1).astype(np.longdouble)
    return 0.5 * np.einsum("ijk,cj,ck->i", limit.quadratic[:n], kicks, kicks)


def kicked_limit(
    layers: Layers,
    s: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    h: float,
    beta: float = 0.0,
    digits: int = 40,
) -> np.ndarray:
    """D^2 Phi_h[first, second] of kicks in W and v by central differences in many digits, `(n,)`.

    Kicks of size 10^(-digits/4) make both the truncation of the differences and their rounding
    10^(-digits/2).
    """
    with mpmath.workdps(digits):
        exact = np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])
        base = [exact(w) for w in layers]
        target, moment = reference.end_to_end(base), exact(s)
        eps = mpmath.mpf(10) ** (-digits // 4)

        def limit(kick: np.ndarray) -> np.ndarray:
            v, size = layers_of(exact(kick) * eps, base), mpmath.mpf(1)
            w = [a + k for a, k in zip(base, v, strict=True)]
            while size > mpmath.mpf(10) ** -digits:
                g = reference.gradient(w, moment, target @ moment)
                v = [mpmath.mpf(beta) * a - mpmath.mpf(h) * b for a, b in zip(v, g, strict=True)]
                w = [a + b for a, b in zip(w, v, strict=True)]
                size = max(abs(entry) for layer in v for entry in layer.ravel())
            return reference.flatten(w)

        total = 0
        for sign, kick in ((1, first + second), (-1, first - second)):
            total = total + sign * (limit(kick) + limit(-kick))
        return (total / (4 * eps**2)).astype(float)


# Noise that depends on where the weights are


class UnstableError(Exception):
    """The fast motion has no stationary second moments."""


class Noise(NamedTuple):
    """Noise on M at P = T + rho: one of rho s[q] + e[q], covariance summed with chance[q].

    `chance` `(q,)` are probabilities times factors of variance, `s` `(q, d_0, d_0)`, `e`
    `(q, d_N, d_0)`.
    """

    chance: np.ndarray
    s: np.ndarray
    e: np.ndarray


def network(widths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Normal weights, first layer first."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape[::-1]) for shape in itertools.pairwise(widths)]


class Sample(NamedTuple):
    """Rows x, y for which the layers are a minimum, and the second moment of the inputs."""

    layers: list[np.ndarray]
    x: np.ndarray
    y: np.ndarray
    s: np.ndarray


def fitted_sample(
    widths: Sequence[int],
    n: int,
    inputs: float = 0.0,
    residual: float = 0.5,
    seed: int = 0,
    singular: bool = False,
) -> Sample:
    """A random network and data with a residual that it fits best, under noise on the inputs."""
    layers, rng = network(widths, seed), np.random.default_rng(seed + 1)
    x = rng.normal(size=(n, widths[0]))
    if singular:
        x = np.outer(x[:, 0], np.linspace(1.0, 0.5, widths[0]))
    e = rng.normal(size=(n, widths[-1]))
    e -= x @ np.linalg.lstsq(x, e, rcond=None)[0]
    s, p = x.T @ x / n, reference.end_to_end(layers)
    y = x @ (p + inputs**2 * p @ np.linalg.pinv(s)).T + residual * e
    return Sample(layers, x, y, s + inputs**2 * np.eye(widths[0]))


def centred_noise(
    chance: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray, factor: float = 1.0
) -> Noise:
    """Of the mean gradient of the rows of a step.

    `chance` `(..., q)` sums to one, rows `x` `(..., q, b, d_0)` and `y`. Leading axes are outcomes
    that the step averages itself: only the spread within them is noise.
    """
    size = x.shape[-2]
    s = np.swapaxes(x, -1, -2) @ x / size
    e = np.swapaxes(x @ target.T - y, -1, -2) @ x / size
    inside = (chance / chance.sum(axis=-1, keepdims=True))[..., None, None]
    s = s - np.sum(inside * s, axis=-3, keepdims=True)
    e = e - np.sum(inside * e, axis=-3, keepdims=True)
    return Noise(factor * chance.ravel(), *(m.reshape(-1, *m.shape[-2:]) for m in (s, e)))


def sample_noise(
    x: np.ndarray,
    y: np.ndarray,
    target: np.ndarray,
    rows: Sequence[Sequence[int]],
    inputs: float = 0.0,
    labels: float = 0.0,
) -> Noise:
    """All steps on a finite sample: every batch of rows, with noise on its inputs and labels."""
    batches = np.array([list(b) for b in rows])
    size = batches.shape[1]
    d_in, d_out = x.shape[1], y.shape[1]
    xi, of_xi = reference.gauss_hermite(size * d_in if inputs else 0, 3)
    eps, of_eps = reference.gauss_hermite(size * d_out if labels else 0, 2)
    xs, ys = x[batches][:, None, None], y[batches][:, None, None]
    if inputs:
        xs = xs + inputs * xi.reshape(-1, 1, size, d_in)
    if labels:
        ys = ys + labels * eps.reshape(-1, size, d_out)
    grid = (len(batches), len(of_xi), len(of_eps))
    chance = np.broadcast_to(np.outer(of_xi, of_eps) / len(batches), grid).ravel()
    xs = np.broadcast_to(xs, (*grid, size, d_in)).reshape(-1, size, d_in)
    ys = np.broadcast_to(ys, (*grid, size, d_out)).reshape(-1, size, d_out)
    return centred_noise(chance, xs, ys, target)


def population_noise(
    s: np.ndarray,
    target: np.ndarray,
    residual: float,
    averaged: int,
    online: bool,
    inputs: float = 0.0,
    labels: float = 0.0,
) -> Noise:
    """Gaussian rows x ~ N(0, S), y = T_0 x + noise, whose best map with noisy inputs is `target`.

    Online, `averaged` fresh rows make a step; else the rows are fixed and only the noise on their
    inputs and labels is drawn anew.
    """
    d_out, d_in = target.shape
    clean = target @ (s + inputs**2 * np.eye(d_in)) @ np.linalg.inv(s)
    fixed, chance = reference.gauss_hermite(d_in + (d_out if residual else 0), 3)
    xi, of_xi = reference.gauss_hermite(d_in if inputs else 0, 3)
    eps, of_eps = reference.gauss_hermite(d_out if labels else 0, 2)
    x = fixed[:, :d_in] @ np.linalg.cholesky(s).T
    y = x @ clean.T
    if residual:
        y = y + np.sqrt(residual) * fixed[:, d_in:]
    grid = (len(x), len(xi), len(eps))
    xs = x[:, None, None] + (inputs * xi[:, None] if inputs else 0.0)
    ys = y[:, None, None] + (labels * eps if labels else 0.0)
    shape = (1, -1) if online else (len(x), -1)
    total = np.broadcast_to(np.multiply.outer(chance, np.outer(of_xi, of_eps)), grid)
    rows = [
        np.broadcast_to(r, (*grid, r.shape[-1])).reshape(*shape, 1, r.shape[-1]) for r in (xs, ys)
    ]
    return centred_noise(total.reshape(shape), *rows, target, 1.0 / averaged)


def label_noise(s: np.ndarray, d_out: int, variance: float) -> Noise:
    """Covariance `variance` I (x) S, whatever the weights."""
    root = factor_of(s)
    e = np.stack([np.outer(i, r) for i in np.eye(d_out) for r in root.T])
    return Noise(np.full(len(e), variance), np.zeros((len(e), *s.shape)), e)


def factor_of(s: np.ndarray) -> np.ndarray:
    """R `(d_0, rank)` with S = R R^T."""
    values, vectors = np.linalg.eigh(s)
    kept = values > 1e-12 * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


class Stationary(NamedTuple):
    """Second moments of the linearised fast motion in the coordinates x = vec(rho R), S = R R^T.

    - `x`: of x; `velocity`: of R-coordinates of the velocity of P; `kernel`: K.
    - `columns` `(c, d_N, d_0)`: of the noise on M, its covariance averaged over the fast motion.
    """

    x: np.ndarray
    velocity: np.ndarray
    kernel: np.ndarray
    columns: np.ndarray


def stationary(
    layers: Layers, s: np.ndarray, noise: Noise, h: float, beta: float = 0.0
) -> Stationary:
    """Second moments at rest of x+ = x + nu+, nu+ = beta nu - h K (x (1 + s_k) + e_k).

    The noise is independent from step to step, so its second moments given x are averaged over x.
    """
    root = factor_of(s)
    back = np.linalg.pinv(root)
    d_out, rank = layers[-1].shape[0], root.shape[1]
    full = np.zeros((d_out * rank, d_out * rank))
    for i in range(1, len(layers) + 1):
        a, half = reference.above(layers, i), reference.below(layers, i) @ root
        full += np.kron(a @ a.T, half.T @ half)
    values, vectors = np.linalg.eigh(full)
    basis = vectors[:, values > 1e-11 * values[-1]]  # where P can move
    size = basis.shape[1]
    kernel, one = basis.T @ full @ basis, np.eye(size)
    mean = np.block([[one - h * kernel, beta * one], [-h * kernel, beta * one]])
    kick = np.kron([[1.0], [1.0]], -h * basis.T @ full)
    e = np.sqrt(noise.chance)[:, None] * (noise.e @ back.T).reshape(-1, d_out * rank)
    hat = (back @ noise.s @ back.T).reshape(-1, rank**2)
    squares = (hat.T @ (noise.chance[:, None] * hat)).reshape(rank, rank, rank, rank)
    one_out = np.eye(d_out)
    spread = np.einsum("ijkl,ab,cd->aickbjdl", squares, one_out, one_out)
    spread = spread.reshape(full.size, full.size) @ np.kron(basis, basis)
    sees = np.eye(size, 2 * size)
    both = np.kron(kick, kick)
    step = np.kron(mean, mean) + both @ spread @ np.kron(sees, sees)
    if np.abs(np.linalg.eigvals(step)).max() >= 1.0:
        raise UnstableError
    moment = np.linalg.solve(np.eye(len(step)) - step, both @ (e.T @ e).ravel())
    moment = moment.reshape(2 * size, 2 * size)
    inside = moment[:size, :size]
    effective = e.T @ e + (spread @ inside.ravel()).reshape(full.shape)
    x, velocity = (basis @ m @ basis.T for m in (inside, moment[size:, size:]))
    values, vectors = np.linalg.eigh((effective + effective.T) / 2)
    columns = (vectors * np.sqrt(np.maximum(values, 0.0))).T.reshape(-1, d_out, rank) @ root.T
    return Stationary(x, velocity, full, columns)


def pulled(layers: Layers, columns: np.ndarray) -> np.ndarray:
    """Gradients of noises on M `(c, d_N, d_0)`, one flat vector each."""
    return np.stack([reference.flatten(reference.pull_back(layers, m)) for m in columns])


def noise_drift(
    layers: Layers, s: np.ndarray, noise: Noise, h: float, beta: float = 0.0
) -> np.ndarray:
    """Expected displacement along the manifold in one step, `(n,)`."""
    columns = stationary(layers, s, noise, h, beta).columns
    return kick_drift(layers, s, pulled(layers, columns), h, beta).astype(float)


def balance_drift(
    layers: Layers, s: np.ndarray, noise: Noise, h: float, beta: float = 0.0
) -> list[np.ndarray]:
    """Expected change of every G_i in one step, from second moments of the gradient alone.

    G_i moves by h^2 (g_{i+1}^T g_{i+1} - g_i g_i^T) exactly. With a heavy ball
    Q_i = sym(W_{i+1}^T v_{i+1} - v_i W_i^T) obeys Q_i+ = beta Q_i + V_i and G_i moves by
    2 beta Q_i + V_i, V_i = v_{i+1}^T v_{i+1} - v_i v_i^T: (1 + beta) / (1 - beta) V_i on average.
    """
    at = stationary(layers, s, noise, h, beta)
    root = factor_of(s)
    shape = (-1, layers[-1].shape[0], root.shape[1])
    values, vectors = np.linalg.eigh((at.velocity + at.velocity.T) / 2)
    half = vectors * np.sqrt(np.maximum(values, 0.0))
    moves = (np.linalg.pinv(at.kernel, rcond=1e-11, hermitian=True) @ half).T.reshape(shape)
    squares = [reference.balancedness(reference.pull_back(layers, m @ root.T)) for m in moves]
    return [(1 + beta) / (1 - beta) * sum(parts) for parts in zip(*squares, strict=True)]


def balance_change(layers: Layers, moves: Layers) -> list[np.ndarray]:
    """The change of every G_i under a small change of the layers, to first order."""
    upper = [w.T @ v for w, v in zip(layers[1:], moves[1:], strict=True)]
    lower = [v @ w.T for w, v in zip(layers[:-1], moves[:-1], strict=True)]
    return [a + a.T - b - b.T for a, b in zip(upper, lower, strict=True)]


def classical_drift(
    layers: Layers, s: np.ndarray, columns: np.ndarray, h: float, beta: float = 0.0
) -> np.ndarray:
    """Leading order in h: -(h^2 / (2 (1 - beta)^2)) P_T D^3 L[X] with H X + X H = noise, `(n,)`."""
    hessian, third = (d.astype(float) for d in derivatives(layers, s))
    values, vectors = np.linalg.eigh(hessian)
    normal = vectors[:, values > 1e-10 * values[-1]]
    inside = columns @ normal
    x = scipy.linalg.solve_continuous_lyapunov(normal.T @ hessian @ normal, inside.T @ inside)
    force = np.einsum("jki,jk->i", third, normal @ x @ normal.T)
    return -(h**2) / (2 * (1 - beta) ** 2) * (force - normal @ (normal.T @ force))


def decay_drift(
    layers: Layers, s: np.ndarray, rate: float, h: float, beta: float = 0.0, coupled: bool = True
) -> np.ndarray:
    """First order in the rate of weight decay, which kicks W, and v too if coupled, `(n,)`."""
    kick = -h * rate * reference.flatten(layers)
    state = np.concatenate([kick, kick if coupled else np.zeros_like(kick)])
    return (limit_expansion(layers, s, h, beta).linear @ state)[: len(kick)].astype(float)


def tangent_part(layers: Layers, s: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The part of a flat vector in the kernel of the Hessian."""
    values, vectors = np.linalg.eigh(derivatives(layers, s)[0].astype(float))
    kept = vectors[:, values <= 1e-10 * values[-1]]
    return kept @ (kept.T @ vector)


def top_curvature(layers: Layers, s: np.ndarray) -> float:
    """The largest eigenvalue of the Hessian."""
    return float(np.linalg.eigvalsh(derivatives(layers, s)[0].astype(float))[-1])


def follow(
    layers: Layers,
    s: np.ndarray,
    noise: Noise,
    h: float,
    beta: float,
    steps: int,
    pieces: int,
) -> list[np.ndarray]:
    """The layers after many steps along the slow drift: Runge-Kutta 4, then back to P = T."""
    target, length = reference.end_to_end(layers), steps / pieces

    def slope(flat: np.ndarray) -> np.ndarray:
        return noise_drift(layers_of(flat, layers), s, noise, h, beta)

    flat = reference.flatten(layers)
    for _ in range(pieces):
        a = slope(flat)
        b = slope(flat + length / 2 * a)
        c = slope(flat + length / 2 * b)
        d = slope(flat + length * c)
        flat = flat + length / 6 * (a + 2 * b + 2 * c + d)
        for _ in range(3):
            at = layers_of(flat, layers)
            miss = (reference.end_to_end(at) - target).ravel()
            flat = flat - np.linalg.pinv(reference.jacobian(at).T, rcond=1e-9) @ miss
    return layers_of(flat, layers)
