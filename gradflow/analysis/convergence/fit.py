r"""The order of a difference $e(h) \sim c\, h^p$ from its values at a few step sizes."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import linalg, optimize
from scipy.special import chdtrc, ndtri

RESOLVED = "resolved"
UNRESOLVED = "not resolved"
DRIFTING = "not asymptotic"
BELOW = "below resolution"

FEWEST = 3
"""Points from which an order is read; two always lie on a power law."""

SIGNIFICANT = 3.0
"""Standard errors from which a difference counts as seen."""

CORRECTION = 0.3
"""Size of the relative corrections to one power law that the asymptotic range may hold."""

TERMS = 6
"""Powers of h in the relative correction."""

CORRECTIONS = CORRECTION / np.arange(1, TERMS + 1)
"""Their standard deviations: the logarithm of a correction has coefficients like 1/k."""

WIDEST = 0.5
"""Largest half width of the interval of an order that is called resolved."""

REJECTED = 0.01
"""A range whose chi-square has a smaller p-value is not one power law."""

SHARPEST = 1e-6
"""Relative errors of the points are taken no smaller than this: the fit stays well conditioned."""

NEAR = 0.35
"""Distance to the order within which the slope between the two smallest steps must lie."""

APPROACH = 0.03
"""How much farther from the order the slope may be at small steps than at large ones."""

CANDIDATES = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Orders with which differences too small to see are extrapolated."""

MOST_FACTOR = 1e7
"""No more than this multiple of the replicas is promised to resolve an order."""


@dataclass(frozen=True)
class OrderFit:
    """What the points of one observable say about its order.

    - `status`: "resolved", "not resolved", "not asymptotic" or "below resolution".
    - `order`, `low`, `high`: NaN unless resolved.
    - `asymptotic_range`: smallest and largest step size of the fit, None unless resolved.
    - `used`: points in the fit; `seen`: points above the noise and the resolution.
    - `reason`: one sentence.
    - `replicas_factor`: how many times the replicas would resolve the order; None if it is
      resolved, or if no number would.
    """

    status: str
    order: float
    low: float
    high: float
    asymptotic_range: tuple[float, float] | None
    used: Bool[np.ndarray, " point"]
    seen: Bool[np.ndarray, " point"]
    reason: str
    replicas_factor: float | None = None


@dataclass(frozen=True)
class _PowerLaw:
    """A fitted power law: its exponent with standard error, and how well it describes the data."""

    order: float
    error: float
    p_value: float


def fit_order(
    step_sizes: Float[np.ndarray, " point"],
    error: Float[np.ndarray, " point"],
    standard_error: Float[np.ndarray, " point"],
    resolution: Float[np.ndarray, " point"],
    confidence: float = 0.95,
    spacing: float = 0.5,
) -> OrderFit:
    r"""Fit $e(h) = c\, h^p (1 + \delta(h))$ on the largest range of small steps that it describes.

    The relative correction is $\log(1 + \delta) = \sum_k b_k (h / h_{max})^k$ with
    $b_k \sim N(0, (0.3/k)^2)$: in the asymptotic range one power law rules up to corrections that
    fade with h, and the interval of $p$ holds what they can do to it. With exact data this
    extrapolates the local slopes to $h \to 0$ (as Richardson does); with noisy data it is weighted
    least squares of $\log |e|$ against $\log h$, but in the signed errors, so that points in the
    noise bias nothing. Starting with all points, the largest step is left out until the chi-square
    accepts the fit, the interval holds a possible order (a multiple of `spacing`: any other slope
    is on its way from one of them to the next), and the local slopes come closer to that order, not
    away from it, as h falls. With fewer than three points left the data are not asymptotic.

    **Arguments:**

    - `step_sizes`: $h > 0$; `error`: $e(h)$, NaN where there is none.
    - `standard_error`: of $e$, 0 where it is exact.
    - `resolution`: size below which $e$ is rounding or the error of an integrator.
    - `confidence`: of the interval.
    - `spacing`: of the possible orders: 1 where differences expand in h, 1/2 where they expand in
        its square root, as those of noisy paths do.
    """
    h, e = np.asarray(step_sizes, float), np.asarray(error, float)
    noise, floor = np.asarray(standard_error, float), np.asarray(resolution, float)
    usable = np.isfinite(e) & np.isfinite(noise)
    sigma = np.sqrt(np.where(usable, noise, 0.0) ** 2 + (floor / SIGNIFICANT) ** 2)
    seen = usable & (np.abs(e) >= SIGNIFICANT * sigma) & (e != 0.0)
    nothing = OrderFit(
        UNRESOLVED, math.nan, math.nan, math.nan, None, np.zeros(h.size, bool), seen, ""
    )
    if usable.sum() < FEWEST:
        reason = f"{usable.sum()} usable step sizes; an order needs {FEWEST}"
        return replace(nothing, reason=reason)
    if seen.sum() < FEWEST:
        return _too_small(nothing, h, e, noise, floor, usable, confidence)
    quantile = float(ndtri(0.5 + 0.5 * confidence))
    for largest in np.sort(h[usable])[::-1]:
        used = usable & (h <= largest)
        if (used & seen).sum() < FEWEST:
            break
        law = _fit(h[used], e[used], sigma[used], seen[used])
        half = quantile * law.error
        order = _possible_order(law.order, half, spacing)
        if law.p_value < REJECTED or order is None:
            continue
        if half <= WIDEST and not _is_approached(order, h, e, sigma, used & seen):
            continue
        return _accepted(nothing, law.order, half, h, e, noise, used, confidence)
    drift = _drift(h[usable], e[usable], noise[usable], seen[usable])
    reason = f"no {FEWEST} step sizes follow one power law: {drift}"
    return replace(nothing, status=DRIFTING, reason=reason)


def local_slopes(
    step_sizes: Float[np.ndarray, " point"], error: Float[np.ndarray, " point"]
) -> Float[np.ndarray, " gap"]:
    """The slope of log|e| between neighbouring step sizes, from large to small ones."""
    place = np.argsort(step_sizes)[::-1]
    u, v = np.log(np.asarray(step_sizes)[place]), np.log(np.abs(np.asarray(error)[place]))
    return np.diff(v) / np.diff(u)


def _possible_order(slope: float, half: float, spacing: float) -> float | None:
    """The multiple of `spacing` nearest to a slope, if the interval about it holds one."""
    order = max(round(slope / spacing), 1) * spacing
    return order if abs(slope - order) <= half else None


def _is_approached(
    order: float, h: np.ndarray, e: np.ndarray, sigma: np.ndarray, points: np.ndarray
) -> bool:
    """Whether the local slopes come closer to the order as h falls, up to their errors."""
    place = np.flatnonzero(points)[np.argsort(h[points])[::-1]]
    gaps = -np.diff(np.log(h[place]))
    relative = sigma[place] / np.abs(e[place])
    error = np.hypot(relative[1:], relative[:-1]) / gaps
    away = np.abs(local_slopes(h[place], e[place]) - order)
    doubt = 2.0 * np.hypot(error[-1], error[:-1])
    comes_closer = np.all(away[-1] <= away[:-1] + APPROACH + doubt)
    return bool(comes_closer and away[-1] <= NEAR + 2.0 * error[-1])


def _accepted(
    nothing: OrderFit,
    order: float,
    half: float,
    h: np.ndarray,
    e: np.ndarray,
    noise: np.ndarray,
    used: np.ndarray,
    confidence: float,
) -> OrderFit:
    """The verdict on a power law that describes its range."""
    low, high = order - half, order + half
    if half > WIDEST:
        factor = _factor(h[used], np.abs(e[used]), noise[used], confidence)
        fix = "spread the step sizes wider" if factor is None else "more replicas would tell"
        reason = f"a slope between {low:.2g} and {high:.2g} is no order; {fix}"
        return replace(nothing, reason=reason, replicas_factor=factor)
    out = int((nothing.seen & ~used).sum())
    faint = int((used & ~nothing.seen).sum())
    slopes = ", ".join(f"{slope:.2f}" for slope in local_slopes(h[used], e[used]))
    parts = [f"{int(used.sum())} step sizes with local slopes {slopes}"]
    parts += [f"{out} larger left out"] if out else []
    parts += [f"{faint} in the noise"] if faint else []
    return replace(
        nothing,
        status=RESOLVED,
        order=order,
        low=low,
        high=high,
        asymptotic_range=(float(h[used].min()), float(h[used].max())),
        used=used,
        reason=", ".join(parts),
    )


def _fit(h: np.ndarray, e: np.ndarray, sigma: np.ndarray, seen: np.ndarray) -> _PowerLaw:
    """Least squares of signed errors with the prior on the corrections."""
    u, powers = _regressors(h)
    sigma = np.maximum(sigma, SHARPEST * np.abs(e))
    sign = np.sign(np.sum((e / sigma)[seen]))
    slope, level = np.polyfit(u[seen], np.log(np.abs(e[seen])), 1)

    def model(theta: np.ndarray) -> np.ndarray:
        # 20 e-foldings above the data are as wrong as 200, and do not overflow
        exponent = theta[0] + theta[1] * u + powers @ theta[2:]
        return sign * np.exp(np.minimum(exponent, np.log(np.abs(e).max()) + 20.0))

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.concatenate([(e - model(theta)) / sigma, theta[2:] / CORRECTIONS])

    def slopes(theta: np.ndarray) -> np.ndarray:
        change = np.column_stack([np.ones_like(u), u, powers])
        upper = -(model(theta) / sigma)[:, None] * change
        lower = np.column_stack([np.zeros((TERMS, 2)), np.diag(1.0 / CORRECTIONS)])
        return np.vstack([upper, lower])

    start = np.concatenate([[level, slope], np.zeros(TERMS)])
    solver: Any = optimize.least_squares
    found = solver(residuals, start, jac=slopes, method="lm", xtol=1e-14, ftol=1e-14)
    chi2, degrees = 2.0 * found.cost, h.size - 2
    covariance = np.linalg.pinv(found.jac.T @ found.jac, hermitian=True)
    return _PowerLaw(
        order=float(found.x[1]),
        error=math.sqrt(covariance[1, 1] * max(1.0, chi2 / degrees)),
        p_value=float(chdtrc(degrees, chi2)),
    )


def _regressors(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(h / h_max), and the powers of h / h_max in the correction."""
    x = h / h.max()
    return np.log(x), x[:, None] ** np.arange(1, TERMS + 1)


def _slope_error(h: np.ndarray, relative: np.ndarray) -> float:
    """Standard error of the exponent from points of the given relative errors."""
    u, powers = _regressors(h)
    covariance = np.diag(np.maximum(relative, SHARPEST) ** 2) + (powers * CORRECTIONS**2) @ powers.T
    design = np.column_stack([np.ones_like(u), u])
    return math.sqrt(linalg.inv(design.T @ linalg.solve(covariance, design, assume_a="pos"))[1, 1])


def _too_small(
    nothing: OrderFit,
    h: np.ndarray,
    e: np.ndarray,
    noise: np.ndarray,
    floor: np.ndarray,
    usable: np.ndarray,
    confidence: float,
) -> OrderFit:
    """Too few differences are seen: say why, and how many replicas would show them."""
    h, e, noise, floor = h[usable], e[usable], noise[usable], floor[usable]
    count = int(nothing.seen.sum())
    above = f"above the noise at {count} of {h.size} step sizes, {FEWEST} are needed"
    if not noise.any() or (np.abs(e) < floor).sum() > h.size - FEWEST:
        reason = (
            f"below the resolution of the integrator ({floor.max():.2g}) at "
            f"{int((np.abs(e) < floor).sum())} of {h.size} step sizes"
        )
        return replace(nothing, status=BELOW, reason=reason)
    weight = 1.0 / np.maximum(noise, floor / SIGNIFICANT) ** 2
    laws = [h**p for p in CANDIDATES]
    levels = [float(np.sum(weight * e * law) / np.sum(weight * law**2)) for law in laws]
    misfits = [np.sum(weight * (e - c * law) ** 2) for c, law in zip(levels, laws, strict=True)]
    best = int(np.argmin(misfits))
    spread = 1.0 / math.sqrt(float(np.sum(weight * laws[best] ** 2)))
    level = abs(levels[best])
    if level < 2.0 * spread:
        least = _factor(h, (level + 2.0 * spread) * laws[best], noise, confidence)
        bound = "" if least is None else f"; at least {least:.2g} times the replicas are needed"
        return replace(nothing, reason=f"{above}; no difference is seen{bound}")
    factor = _factor(h, level * laws[best], noise, confidence)
    if factor is None:
        return replace(nothing, reason=f"{above}; use larger step sizes")
    return replace(nothing, reason=above, replicas_factor=factor)


def _factor(h: np.ndarray, size: np.ndarray, noise: np.ndarray, confidence: float) -> float | None:
    """How many times the replicas would show differences of this size and settle their order."""
    if not noise.any():
        return None
    quantile = float(ndtri(0.5 + 0.5 * confidence))
    for factor in np.geomspace(1.0, MOST_FACTOR, 141):
        relative = noise / math.sqrt(factor) / size
        # one standard error more than needed: five times out of six the noise then lets it pass
        enough = np.sum(relative * (SIGNIFICANT + 1.0) <= 1.0) >= FEWEST
        if enough and quantile * _slope_error(h, relative) <= 0.8 * WIDEST:
            return max(float(factor), 1.2)
    return None


def _drift(h: np.ndarray, e: np.ndarray, noise: np.ndarray, seen: np.ndarray) -> str:
    """What else the differences do, in words."""
    if np.any(e[seen] > 0) and np.any(e[seen] < 0):
        return "the difference changes sign, so its leading coefficient nearly vanishes"
    slopes = local_slopes(h[seen], e[seen])
    listed = f"local slopes {', '.join(f'{s:.3g}' for s in slopes)} from large to small h"
    share = _leading_share(h, e, noise)
    if share > 0.5:
        return listed
    return f"{listed}; the leading coefficient nearly vanishes (a share of {share:.0%})"


def _leading_share(h: np.ndarray, e: np.ndarray, noise: np.ndarray) -> float:
    r"""The first term of $e = c_1 h + c_2 h^2 + c_3 h^3$ at the smallest h over the largest."""
    exponents = np.arange(1, min(3, h.size - 1) + 1)
    weight = 1.0 / np.maximum(noise, 1e-3 * np.abs(e))
    design = (h / h.min())[:, None] ** exponents * weight[:, None]
    terms = np.abs(np.linalg.lstsq(design, e * weight, rcond=None)[0])
    return float(terms[0] / terms.max())
