"""Curvature against the Hessian that NumPy gets by complex steps of the gradient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled, evaluate, sharpness
from curvature_cases import CASES, Quartic, autodiff_hessian, case, minimum, network, samples
from hypothesis import assume, given
from reference import as_numpy, assert_close, scale
from strategies import cases, whitened

import gradflow as gf
from gradflow.geometry import end_to_end_kernel, extreme_eigenvalues
from gradflow.geometry.curvature import DENSE_SIZE, smallest_positive
from gradflow.regularizers import Dropout


def hessian(net, data):
    return reference.hessian(as_numpy(net.weights), np.asarray(data.sxx), np.asarray(data.syx))


def blocks(net):
    """Where every layer's entries lie among all parameters."""
    ends = np.cumsum([w.size for w in net.weights])
    return [slice(end - w.size, end) for w, end in zip(net.weights, ends, strict=True)]


def at_a_minimum(net, data):
    """Population data of the same inputs whose minima include the network."""
    p = reference.end_to_end(as_numpy(net.weights))
    return gf.Regression.from_moments(data.sxx, p @ np.asarray(data.sxx))


@pytest.mark.slow
@given(cases())
def test_traces_and_sharpness(case):
    net, data = case
    full = hessian(net, data)
    traces = [np.trace(full[b, b]) for b in blocks(net)]
    size = scale(net.weights, [full])
    assert_close(evaluate(net, data).block_traces, traces, size)
    assert_close([gf.hessian_trace(net, data)], [np.trace(full)], size)
    assert_close([sharpness(net, data)], [np.linalg.eigvalsh((full + full.T) / 2)[-1]], size)


@pytest.mark.slow
@given(cases())
def test_spectrum_at_a_minimum(case):
    net, data = case
    minimum = at_a_minimum(net, data)
    full = np.linalg.eigvalsh(hessian(net, minimum))
    spectrum = np.asarray(gf.minima_spectrum(net, minimum.sxx))
    short, long = sorted([spectrum[::-1], full[::-1]], key=len)
    padded = np.concatenate([short, np.zeros(len(long) - len(short))])
    assert_close([np.sort(padded)], [np.sort(long)], scale(net.weights, [full]), 1e-11)
    assert np.all(np.diff(spectrum) >= 0)


@pytest.mark.slow
@given(cases())
def test_kernel(case):
    net, data = case
    layers = as_numpy(net.weights)
    left, singular, _ = np.linalg.svd(np.asarray(data.sxx))
    root = (left * np.sqrt(singular)) @ left.T
    kernel = np.asarray(end_to_end_kernel(net, data.sxx))
    expected = np.zeros_like(kernel)
    for i in range(1, net.depth + 1):
        a, b = reference.above(layers, i), reference.below(layers, i)
        jacobian = np.stack(
            [
                (a @ unit @ b @ root).ravel()
                for unit in np.eye(layers[i - 1].size).reshape(-1, *layers[i - 1].shape)
            ],
            axis=1,
        )
        expected = expected + jacobian @ jacobian.T
    # The square root of a singular matrix has an error of the root of the rounding error.
    assert_close([kernel], [expected], scale(layers, [expected, data.sxx]), 1e-7)


@given(cases(kind=whitened, min_depth=2))
def test_minima_are_valleys_along_changes_of_hidden_basis(case):
    """(X W_1, -W_2 X) lies in the kernel of a Hessian that has no negative eigenvalue."""
    net, data = case
    full = hessian(net, at_a_minimum(net, data))
    x = np.arange(1.0, 1.0 + net.widths[1] ** 2).reshape(net.widths[1], -1) / 4
    layers = as_numpy(net.weights)
    tangent = [x @ layers[0], -layers[1] @ x, *[np.zeros_like(w) for w in layers[2:]]]
    size = scale(layers, tangent, [full])
    assert_close([full @ reference.flatten(tangent)], [np.zeros(len(full))], size)
    assert np.linalg.eigvalsh(full)[0] >= -1e-11 * size


@given(cases(kind=whitened))
def test_sharpness_of_minima_has_a_lower_bound(case):
    """At least N s_1^{2 - 2/N} with s_1 the largest singular value of the target."""
    net, data = case
    minimum = at_a_minimum(net, data)
    top = np.linalg.norm(np.asarray(minimum.best_map), 2)
    assume(top > 1e-3)
    bound = net.depth * top ** (2.0 - 2.0 / net.depth)
    assert float(sharpness(net, minimum)) >= bound * (1 - 1e-10)


def test_sharpness_of_two_scalar_layers():
    w1, w2, sxx, b = 1.5, -0.4, 1.3, 0.7
    net = gf.DeepLinear([[[w1]], [[w2]]])
    data = gf.Regression.from_moments([[sxx]], [[b]])
    u = w1**2 - w2**2
    expected = (
        sxx * (w1**2 + w2**2) + np.sqrt(sxx**2 * u**2 + 4 * (2 * sxx * w1 * w2 - b) ** 2)
    ) / 2
    np.testing.assert_allclose(float(gf.sharpness(net, data)), expected, rtol=1e-13)
    np.testing.assert_allclose(float(gf.hessian_trace(net, data)), sxx * (w1**2 + w2**2))


block_traces = compiled(gf.hessian_block_traces)
ends = compiled(extreme_eigenvalues)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("name", CASES)
def test_curvature_of_the_averaged_loss(name):
    """Every regularizer and combination: traces of the blocks and both ends of the spectrum."""
    net, problem = case(name)
    full = np.asarray(autodiff_hessian(problem, net.weights))
    size = scale([full])
    traces = [np.trace(full[b, b]) for b in blocks(net)]
    assert_close([block_traces(net, problem)], [traces], size)
    assert_close([gf.hessian_trace(net, problem)], [np.sum(traces)], size)
    values = np.linalg.eigvalsh(full)
    assert_close([sharpness(net, problem)], [values[-1]], size)
    smallest, largest = ends(net, problem, 3)
    assert_close([smallest, largest], [values[:3], values[-3:]], size)


def test_block_traces_of_a_small_penalty_beside_large_noise():
    """The trace of a block keeps its digits where the expected loss is 1e12 times larger."""
    net = gf.DeepLinear([1e6 * np.eye(2), 1e-6 * np.eye(2)])
    problem = gf.Problem(gf.Regression.whitened(np.eye(2)), [Dropout(0.5)])
    # C_1 = 1e12 I, doubled by dropout: tau_2 = 2 |I|^2 1e12, tau_1 = 2 |1e-6 I|^2 tr I.
    np.testing.assert_allclose(block_traces(net, problem), [8e-12, 8e12], rtol=1e-12)


def test_trace_of_a_large_own_penalty_is_refused():
    net = network((45, 45))
    problem = gf.Problem(samples((45, 45), 3), [Quartic()])
    with pytest.raises(
        ValueError, match=r"Hessian of Quartic needs a product for each of the 2025"
    ):
        gf.hessian_trace(net, problem)


# Networks of more parameters than are decomposed densely: Lanczos.

LARGE = (10, 12, 10, 8)


def rotated(values: list[float], depth: int, seed: int = 3) -> gf.DeepLinear:
    """Balanced layers with the given singular values, seen in random bases."""
    rng = np.random.default_rng(seed)
    n = len(values)
    bases = [np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(depth + 1)]
    return gf.DeepLinear([bases[i + 1] @ np.diag(values) @ bases[i].T for i in range(depth)])


def at_target(net: gf.DeepLinear, sxx: np.ndarray | None = None) -> gf.Regression:
    """Data of which the network is a minimum; moments, so that equal shapes share a program."""
    s = np.eye(net.widths[0]) if sxx is None else sxx
    return gf.Regression.from_moments(s, np.asarray(net.end_to_end) @ s)


def large_cases() -> dict[str, tuple[gf.DeepLinear, gf.Regression]]:
    square = network((12, 12, 12, 12))
    equal = rotated([1.0] * 12, 3)
    cluster = rotated([1.0 + 1e-6, 1.0, *np.linspace(0.99, 0.5, 10)], 3)
    scalar = network((1, 40, 10, 1))
    identity = gf.DeepLinear([np.eye(17)])
    narrow = network((16, 16, 1))
    flat = np.diag([1.0] * 3 + [0.0] * 13)
    return {
        "away from minima": (square, at_target(equal)),
        "far away, more negative than positive": (
            gf.DeepLinear([1e-3 * w for w in square.weights]),
            at_target(equal),
        ),
        "equal eigenvalues": (equal, at_target(equal)),
        "two nearly equal at the top": (cluster, at_target(cluster)),
        "no curvature": (gf.DeepLinear([np.zeros((12, 12))] * 3), at_target(equal)),
        "one positive eigenvalue": (scalar, at_target(scalar)),
        "multiple of the identity": (identity, at_target(identity)),
        "singular inputs": (narrow, at_target(narrow, flat)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", large_cases())
def test_ends_of_a_large_spectrum(name):
    """Lanczos against the dense decomposition, multiplicities counted."""
    net, data = large_cases()[name]
    assert net.num_parameters > DENSE_SIZE
    full = hessian(net, data)
    values = np.linalg.eigvalsh((full + full.T) / 2)
    atol = 1e-10 * np.abs(values).max()
    np.testing.assert_allclose(float(sharpness(net, data)), values[-1], rtol=0, atol=atol)
    found = ends(net, data, 3)
    np.testing.assert_allclose(found.largest, values[-3:], rtol=0, atol=atol)
    np.testing.assert_allclose(found.smallest, values[:3], rtol=0, atol=atol)


@pytest.mark.slow
def test_ends_of_a_large_spectrum_with_noise_inside():
    net = network((16, 16, 2))
    problem = gf.Problem(samples((16, 2), 30), [Dropout(0.2), gf.WeightDecay(0.1)])
    values = np.linalg.eigvalsh(np.asarray(autodiff_hessian(problem, net.weights)))
    found = ends(net, problem)
    atol = 1e-10 * values[-1]
    np.testing.assert_allclose(found.largest, values[-1:], rtol=0, atol=atol)
    np.testing.assert_allclose(found.smallest, values[:1], rtol=0, atol=atol)


@pytest.mark.slow
def test_sharpness_of_an_ensemble():
    """Mapped and compiled, paths that converge at different times and one that has diverged."""
    data = samples(LARGE, 30)
    nets = [network(LARGE, seed).weights for seed in range(3)]
    nets[1] = tuple(10.0 * w for w in nets[1])
    nets.append(tuple(jnp.full_like(w, jnp.nan) for w in nets[0]))
    layers = tuple(jnp.stack(ws, -1) for ws in zip(*nets, strict=True))
    mapped = eqx.filter_jit(
        jax.vmap(lambda w: gf.sharpness(gf.DeepLinear(w), data), in_axes=-1, out_axes=-1)
    )
    found = np.asarray(mapped(layers))
    for weights, value in zip(nets[:3], found[:3], strict=True):
        full = hessian(gf.DeepLinear(weights), data)
        np.testing.assert_allclose(value, np.linalg.eigvalsh(full)[-1], rtol=1e-10)
    assert np.isnan(found[3])


@pytest.mark.slow
def test_gradient_of_the_sharpness():
    """Against differences of a dense decomposition, of fourth order."""
    net, data = network(LARGE), samples(LARGE, 30)
    gradient = jax.grad(lambda w: gf.sharpness(gf.DeepLinear(w), data))(net.weights)
    rng = np.random.default_rng(0)
    direction = [rng.normal(size=w.shape) for w in net.weights]

    def top(step: float) -> float:
        pairs = zip(net.weights, direction, strict=True)
        moved = gf.DeepLinear([np.asarray(w) + step * v for w, v in pairs])
        return float(np.linalg.eigvalsh(hessian(moved, data))[-1])

    expected = (8 * (top(1e-3) - top(-1e-3)) - (top(2e-3) - top(-2e-3))) / 12e-3
    slope = sum(np.sum(np.asarray(g) * v) for g, v in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(slope, expected, rtol=1e-7)


def test_sharpness_at_width_64():
    """12,288 parameters: balanced layers of whitened data have N s^{2 - 2/N} at a minimum."""
    net = rotated([1.3, *np.linspace(1.25, 0.2, 63)], 3)
    top = float(gf.sharpness(net, at_target(net)))
    np.testing.assert_allclose(top, 3 * 1.3**4, rtol=1e-10)


@pytest.mark.parametrize("k", [0, 9])
def test_more_eigenvalues_than_parameters(k):
    with pytest.raises(
        ValueError, match=f"k must be an integer from 1 to the 8 parameters; got {k}"
    ):
        extreme_eigenvalues(network((2, 2, 2)), samples((2, 2), 4), k)


# The kernel at minima.


@pytest.mark.few_cases(1)
@pytest.mark.parametrize("widths", [(3, 2), (4, 3, 2), (2, 3, 2, 3)])
@pytest.mark.parametrize("kind", ["regular", "singular", "noisy"])
def test_spectrum_at_a_minimum_of_a_problem(widths, kind):
    """Noise on the inputs is part of S; weight decay adds its rate to what is listed."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(2 if kind == "singular" else 9, widths[0]))
    s = rows.T @ rows
    decay = 0.3
    if kind == "noisy":
        net, _ = minimum(widths, s)
        std = 0.7
        noisy = s + std**2 * np.eye(widths[0])
        # The minimum of the noisy problem is P = Y (S + s^2 I)^{-1}: choose Y for it.
        target = np.asarray(net.end_to_end) @ noisy
        data = gf.Regression.from_moments(s, target)
        problem = gf.Problem(data, [gf.InputNoise(std), gf.WeightDecay(decay)])
    else:
        net, data = minimum(widths, s)
        problem = gf.Problem(data, [gf.LabelNoise(0.5), gf.WeightDecay(decay)])
        np.testing.assert_allclose(
            gf.minima_spectrum(net, problem), gf.minima_spectrum(net, data), atol=1e-10
        )
    full = np.asarray(autodiff_hessian(problem, net.weights)) - decay * np.eye(net.num_parameters)
    values = np.sort(np.linalg.eigvalsh(full))[::-1]
    found = np.asarray(gf.minima_spectrum(net, problem))[::-1]
    most = max(len(values), len(found))
    expected = np.pad(values, (0, most - len(values)))
    # Roots of a singular moment carry the square root of rounding.
    atol = (1e-7 if kind == "singular" else 1e-11) * values[0]
    np.testing.assert_allclose(np.pad(found, (0, most - len(found))), expected, atol=atol)


def test_spectrum_at_minima_needs_the_minima_of_the_data():
    net, problem = case("dropout")
    with pytest.raises(ValueError, match=r"minima_spectrum: Dropout, Dropout acts inside the"):
        gf.minima_spectrum(net, problem)


@pytest.mark.few_cases(4)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 2.0], 0.5),
        ([1e-17, 3e-16, 2.0], 2.0),
        ([1e-12, 1.0], 1e-12),
        ([0.0, 0.0], 0.0),
        ([-1e-18, 4.0], 4.0),
    ],
)
def test_smallest_positive_eigenvalue(values, expected):
    assert float(smallest_positive(jnp.array(values))) == expected
