"""The expected drift of balancedness against the enumeration of one step, and section by section.

Formulas are those of theory.md section 5, written in NumPy from per-sample moments.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import drifts, faces
from reference import as_numpy, assert_close, gauss_hermite, scale

import gradflow as gf
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise
from gradflow.theory import (
    expected_balancedness_drift,
    flow_balancedness_drift,
    flow_imbalance_drift,
    imbalance_drift,
)
from gradflow.theory.drift import layer_drifts

X = np.array([[1.0, 0.3], [-0.5, 1.2], [0.7, -0.8]])
Y = np.array([[0.5], [1.5], [-1.0]])
WIDTHS = (2, 3, 2, 1)
H = 0.1


def network(seed=4):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(WIDTHS)
    return gf.DeepLinear([rng.normal(size=shape[::-1]) for shape in shapes])


def one_step(regularizers):
    """All end-to-end gradients of one step and their probabilities."""
    kinds = {type(r): r for r in regularizers}
    rule = kinds.get(gf.Minibatch)
    labels = float(kinds[gf.LabelNoise].std) if gf.LabelNoise in kinds else 0.0
    inputs = float(kinds[gf.InputNoise].std) if gf.InputNoise in kinds else 0.0
    if rule is None:
        rows = np.arange(3)[None]
    else:
        rows = np.array(list(reference.batches(3, rule.batch_size, rule.replacement)))
    size = rows.shape[1]
    xi, xi_chance = gauss_hermite(2 * size if inputs else 0, 3)
    eps, eps_chance = gauss_hermite(size if labels else 0, 2)
    p = reference.end_to_end(as_numpy(network().weights))
    gradients, chances = [], []
    for batch in rows:
        x = X[batch] + inputs * xi.reshape(len(xi), -1, 2) if inputs else X[batch][None]
        y = Y[batch] + labels * eps.reshape(len(eps), -1, 1) if labels else Y[batch][None]
        errors = (x @ p.T)[:, None] - y[None]
        m = np.einsum("abko,aki->aboi", errors, x) / size
        gradients.append(m.reshape(-1, 1, 2))
        chances.append(np.outer(xi_chance, eps_chance).ravel() / len(rows))
    return np.concatenate(gradients), np.concatenate(chances)


CASES = {
    "descent": [],
    "decay": [gf.WeightDecay(0.3)],
    "labels": [gf.LabelNoise(0.5)],
    "labels, decay": [gf.WeightDecay(0.3), gf.LabelNoise(0.5)],
    "inputs": [gf.InputNoise(0.4)],
    "batch": [gf.Minibatch(2)],
    "replacement": [gf.Minibatch(2, replacement=True)],
    "all": [gf.InputNoise(0.4), gf.Minibatch(1), gf.LabelNoise(0.5), gf.WeightDecay(0.3)],
}


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_expected_change_of_one_step(name):
    """E[G_+ - G] / h of every G_i, and of |W_i|^2 - |W_j|^2 for the pair that attains D."""
    regularizers = CASES[name]
    net = network()
    layers = as_numpy(net.weights)
    problem = gf.Problem(gf.Regression.from_samples(X, Y), regularizers)
    rate = sum(float(r.rate) for r in regularizers if isinstance(r, gf.WeightDecay))
    ms, chance = one_step(regularizers)
    np.testing.assert_allclose(chance.sum(), 1.0)

    balance = [np.zeros_like(g) for g in reference.balancedness(layers)]
    norms = np.zeros(len(layers))
    for m, c in zip(ms, chance, strict=True):
        g = reference.pull_back(layers, m)
        after = [w - H * (v + rate * w) for w, v in zip(layers, g, strict=True)]
        balance = [b + c * a for b, a in zip(balance, reference.balancedness(after), strict=True)]
        norms += c * np.array([np.sum(w**2) for w in after])
    before = np.array([np.sum(w**2) for w in layers])
    expected = [(a - b) / H for a, b in zip(balance, reference.balancedness(layers), strict=True)]
    # The exact step has (1 - h rate)^2 where the drift per unit of time has -2 rate and the square
    # of the averaged gradient, penalties included; they agree to rounding.
    drift = drifts(problem, net.weights, H, True)
    size = scale(expected, layers) / H
    assert_close(drift.balancedness, expected, size)
    change = (norms - before) / H
    expected_d = change[np.argmax(before)] - change[np.argmin(before)]
    assert_close([drift.imbalance], [expected_d], size)
    assert_close(np.diff(drift.layers), [np.trace(e) for e in expected], size)


def pulled(layers, i, k_moment, r_moment):
    """B_{i+1} E[M^T K M] B_{i+1}^T - A_i^T E[M R M^T] A_i."""
    b, a = reference.below(layers, i + 1), reference.above(layers, i)
    return b @ k_moment @ b.T - a.T @ r_moment @ a


def weights_of(layers, i):
    """K = A_{i+1} A_{i+1}^T and R = B_i^T B_i."""
    a, b = reference.above(layers, i + 1), reference.below(layers, i)
    return a @ a.T, b.T @ b


def noise_drift(regularizer):
    """Drift of the order-1 SDE: h times the covariance part, in every G_i."""
    problem = gf.Problem(gf.Regression.from_samples(X, Y), [regularizer])
    net = network()
    drift = drifts(problem, net.weights, H, False).balancedness
    return as_numpy(net.weights), [np.asarray(d) / H for d in drift]


def errors_of(layers):
    return X @ reference.end_to_end(layers).T - Y


def test_label_noise():
    s = 0.5
    layers, drift = noise_drift(gf.LabelNoise(s))
    sxx, sy, n = X.T @ X / 3, s**2 * np.eye(1), 3
    for i, actual in enumerate(drift, start=1):
        k, r = weights_of(layers, i)
        expected = pulled(layers, i, np.trace(k @ sy) / n * sxx, np.trace(r @ sxx) / n * sy)
        assert_close([actual], [expected], scale([expected], layers))


@pytest.mark.few_cases(2)
@pytest.mark.parametrize(("batch", "replacement"), [(1, False), (2, False), (2, True), (5, True)])
def test_minibatch(batch, replacement):
    layers, drift = noise_drift(gf.Minibatch(batch, replacement=replacement))
    f = 1 / batch if replacement else (3 - batch) / (batch * 2)
    e = errors_of(layers)
    m = e.T @ X / 3
    for i, actual in enumerate(drift, start=1):
        k, r = weights_of(layers, i)
        of_k = np.einsum("no,op,np,ni,nj->ij", e, k, e, X, X) / 3 - m.T @ k @ m
        of_r = np.einsum("ni,ij,nj,no,np->op", X, r, X, e, e) / 3 - m @ r @ m.T
        expected = pulled(layers, i, f * of_k, f * of_r)
        assert_close([actual], [expected], scale([expected], layers))


def test_input_noise():
    s2 = 0.4**2
    layers, drift = noise_drift(gf.InputNoise(0.4))
    p, e, n, one = reference.end_to_end(layers), errors_of(layers), 3, np.eye(2)
    for i, actual in enumerate(drift, start=1):
        k, r = weights_of(layers, i)
        of_k, of_r = np.zeros((2, 2)), np.zeros((1, 1))
        for x, err in zip(X, e, strict=True):
            mean = np.outer(err, x) + s2 * p
            second_k = (err @ k @ err + s2 * np.trace(p.T @ k @ p)) * (np.outer(x, x) + s2 * one)
            cross = np.outer(x, err @ k @ p)
            second_k += 2 * s2 * (cross + cross.T) + 2 * s2**2 * p.T @ k @ p
            second_r = (x @ r @ x + s2 * np.trace(r)) * (np.outer(err, err) + s2 * p @ p.T)
            cross = np.outer(err, x @ r @ p.T)
            second_r += 2 * s2 * (cross + cross.T) + 2 * s2**2 * p @ r @ p.T
            of_k += (second_k - mean.T @ k @ mean) / n**2
            of_r += (second_r - mean @ r @ mean.T) / n**2
        expected = pulled(layers, i, of_k, of_r)
        assert_close([actual], [expected], scale([expected], layers))


def test_two_scalar_layers_with_any_noise():
    """E[u_+ | w] = u (1 - h^2 E[M^2]), here online with label and input noise."""
    w1, w2, sxx, syx, residual = 1.4, -0.6, 1.3, 0.7, 0.5
    t, s, sigma, batch = syx / sxx, 0.3, 0.2, 2
    data = gf.Regression.from_moments([[sxx]], [[syx]], [[t * syx + residual]])
    problem = gf.Problem(data, [gf.LabelNoise(s), gf.Minibatch(batch), gf.InputNoise(sigma)])
    z, chance = gauss_hermite(4, 3)
    x = np.sqrt(sxx) * z[:, 0]
    y = t * x + np.sqrt(residual) * z[:, 1] + s * z[:, 2]
    noisy = x + sigma * z[:, 3]
    m = (w1 * w2 * noisy - y) * noisy
    mean, square = chance @ m, chance @ m**2
    second = mean**2 + (square - mean**2) / batch
    drift = drifts(problem, (jnp.array([[w1]]), jnp.array([[w2]])), H, True)
    np.testing.assert_allclose(drift.imbalance, -H * (w1**2 - w2**2) * second, rtol=1e-12)


def test_flow_drifts_by_weight_decay_alone():
    net = network()
    problem = gf.Problem(
        gf.Regression.from_samples(X, Y), [gf.LabelNoise(0.5), gf.WeightDecay(0.3)]
    )
    drift = drifts(problem, net.weights, 0.0, False)
    expected = [-0.6 * g for g in reference.balancedness(as_numpy(net.weights))]
    assert_close(drift.balancedness, expected, scale(expected))
    np.testing.assert_allclose(drift.imbalance, -0.6 * gf.imbalance(net), rtol=1e-13)


def test_stochastic_flow_has_the_noise_and_descent_the_square_of_the_mean_too():
    net = network()
    problem = gf.Problem(
        gf.Regression.from_samples(X, Y), [gf.LabelNoise(0.5), gf.WeightDecay(0.3)]
    )
    sde = drifts(problem, net.weights, H, False).balancedness
    sgd = drifts(problem, net.weights, H, True).balancedness
    layers = as_numpy(net.weights)
    m = (X @ reference.end_to_end(layers).T - Y).T @ X / 3
    g = reference.pull_back(layers, m)
    total = [v + 0.3 * w for v, w in zip(g, layers, strict=True)]
    extra = [H * c for c in reference.balancedness(total)]
    assert_close([a - b for a, b in zip(sgd, sde, strict=True)], extra, scale(total))


def test_extra_covariance_is_added_to_that_of_the_noise():
    net = network()
    problem = gf.Problem(gf.Regression.from_samples(X, Y), [gf.LabelNoise(0.5)])
    more = np.array([[0.3, 0.1], [0.1, 0.2]])
    with_extra = layer_drifts(problem, net.weights, H, False, jnp.asarray(more))
    without = layer_drifts(problem, net.weights, H, False)
    root = np.linalg.cholesky(more)
    expected = [
        H * sum(np.sum(reference.pull_back(as_numpy(net.weights), c[None])[i] ** 2) for c in root.T)
        for i in range(3)
    ]
    assert_close(with_extra - without, expected, scale(expected, net.weights))


def test_noise_covariance_of_label_noise_on_a_population():
    """(s^2 / n) I (x) S, row-major."""
    sxx = np.array([[1.3, 0.4], [0.4, 0.8]])
    data = gf.Regression.from_moments(sxx, np.array([[0.7, -1.1], [0.2, 0.5]]) @ sxx, n=5)
    problem = gf.Problem(data, [gf.LabelNoise(0.7)])
    weights = (jnp.eye(2), jnp.asarray([[1.0, 2.0], [0.5, -1.0]]))
    expected = 0.49 / 5 * np.kron(np.eye(2), sxx)
    assert_close([faces(problem, weights).covariance], [expected], 1.0)


def test_step_sizes_are_traced():
    """A sweep over step sizes does not recompile, and noise enters in proportion."""
    net = network()
    problem = gf.Problem(gf.Regression.from_samples(X, Y), [gf.LabelNoise(0.5)])
    traces = []

    @jax.jit
    def drift(h):
        traces.append(h)
        return imbalance_drift(problem, net.weights, h, discrete=False)

    np.testing.assert_allclose(drift(0.2), 2 * drift(0.1), rtol=1e-12)
    assert len(traces) == 1


def test_balanced_layers_drift_nowhere():
    """A tie of all norms has no pair to watch."""
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(0.5)])
    weights = (jnp.ones((1, 1)), jnp.ones((1, 1)))
    assert float(drifts(problem, weights, H, False).imbalance) == 0.0


@pytest.mark.slow
def test_tied_layers_take_the_pair_that_opens_fastest():
    net = gf.init.unbalanced((3, 2, 2, 1), 2.0, key=jax.random.key(3), scale=0.5, heavy=3)
    norms = np.array([float(jnp.sum(w * w)) for w in net.weights])
    assert abs(norms[0] - norms[1]) < 1e-12 < norms[2] - norms[1]
    problem = gf.Problem(gf.Regression.whitened([[1.0, 0.5, -0.5]]), [gf.LabelNoise(0.7)])
    g_1, g_2 = expected_balancedness_drift(problem, net.weights, 0.1, True)
    opening = (float(jnp.trace(g_2)), float(jnp.trace(g_1) + jnp.trace(g_2)))
    assert abs(opening[0] - opening[1]) > 1e-3
    assert np.isclose(float(imbalance_drift(problem, net.weights, 0.1, True)), max(opening))


def entries(layers):
    """Networks of zeros with a single one, for every weight."""
    for i, w in enumerate(layers):
        for place in np.ndindex(w.shape):
            one = [np.zeros_like(v) for v in layers]
            one[i][place] = 1.0
            yield one


@pytest.mark.slow
@pytest.mark.parametrize("discrete", [True, False], ids=["descent", "flow"])
def test_gradient_noise(discrete):
    """Every weight takes a step of its own: the sum over weights of their changes of G."""
    v = 0.3**2 + 0.4**2
    noises = [GradientNoise(0.3), gf.LabelNoise(0.5), GradientNoise(0.4)]
    net, data = network(), gf.Regression.from_samples(X, Y)
    layers = as_numpy(net.weights)
    without = drifts(gf.Problem(data, noises[1:2]), net.weights, H, discrete)
    drift = drifts(gf.Problem(data, noises), net.weights, H, discrete)
    each = [reference.balancedness(one) for one in entries(layers)]
    expected = [H * v * sum(change) for change in zip(*each, strict=True)]
    shift = [a - b for a, b in zip(drift.balancedness, without.balancedness, strict=True)]
    assert_close(shift, expected, scale(layers, without.balancedness))
    for g, (above, below) in zip(expected, [(2, 2), (1, 3)], strict=True):
        assert_close([g], [H * v * (above - below) * np.eye(len(g))], 1.0)
    sizes = [H * v * w.size for w in layers]
    assert_close([drift.layers - without.layers], [sizes], scale(layers, without.balancedness))
    norms = [np.sum(w**2) for w in layers]
    spread = sizes[np.argmax(norms)] - sizes[np.argmin(norms)]
    assert np.isclose(drift.imbalance - without.imbalance, spread, rtol=1e-10)


def svag_or_order_two(problem, net, **options):
    run = jax.jit(lambda w: expected_balancedness_drift(problem, w, H, **options))
    layers = jax.jit(lambda w: layer_drifts(problem, w, H, **options))
    return as_numpy(run(net.weights)), np.asarray(layers(net.weights))


@pytest.mark.slow
def test_amplified_descent():
    """SVAG: steps h / l with l times the covariance; decay, mean square and noise by hand."""
    net, rate, amplification = network(), 0.3, 4
    data = gf.Regression.from_samples(X, Y)
    problem = gf.Problem(data, [gf.LabelNoise(0.5), gf.WeightDecay(rate)])
    layers, h = as_numpy(net.weights), H / amplification
    m = (X @ reference.end_to_end(layers).T - Y).T @ X / 3
    g = [v + rate * w for v, w in zip(reference.pull_back(layers, m), layers, strict=True)]
    noise = [np.zeros_like(b) for b in reference.balancedness(layers)]
    for column in np.linalg.cholesky(0.25 / 3 * X.T @ X / 3).T:
        z = reference.balancedness(reference.pull_back(layers, column[None]))
        noise = [a + amplification * b for a, b in zip(noise, z, strict=True)]
    after = reference.balancedness([w - h * v for w, v in zip(layers, g, strict=True)])
    parts = zip(after, reference.balancedness(layers), noise, strict=True)
    expected = [(a - b + h**2 * c) / h for a, b, c in parts]
    drift, norms = svag_or_order_two(problem, net, discrete=True, amplification=amplification)
    assert_close(drift, expected, scale(expected, layers) / h)
    assert_close(np.diff(norms), [np.trace(e) for e in expected], scale(expected, layers) / h)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_flow_of_order_two(rate):
    """The ODE with the drift -grad(L + (h/4) |grad L|^2), by differences of its gradient.

    Without decay the drift is that of one step of descent.
    """
    net = network()
    problem = gf.Problem(gf.Regression.from_samples(X, Y), [gf.WeightDecay(rate)])
    layers, sxx, syx = as_numpy(net.weights), X.T @ X / 3, Y.T @ X / 3

    def potential(ws):
        g = [v + rate * w for v, w in zip(complex_gradient(ws, sxx, syx), ws, strict=True)]
        square = sum(np.sum(v * v) for v in g)
        return (
            reference.loss(ws, sxx, syx, np.zeros((1, 1)))
            + rate / 2 * sum(np.sum(w * w) for w in ws)
            + H / 4 * square
        )

    velocity = [-v for v in reference.complex_step_gradient(potential, layers)]
    upper = [w.T @ v for w, v in zip(layers[1:], velocity[1:], strict=True)]
    lower = [v @ w.T for w, v in zip(layers[:-1], velocity[:-1], strict=True)]
    expected = [a + a.T - b - b.T for a, b in zip(upper, lower, strict=True)]
    size = scale(expected, layers) ** 2
    drift, norms = svag_or_order_two(problem, net, discrete=False, order=2)
    assert_close(drift, expected, size)
    assert_close(np.diff(norms), [np.trace(e) for e in expected], size)
    arrays = tuple(jnp.asarray(v) for v in velocity)
    assert_close(flow_balancedness_drift(net.weights, arrays), expected, size)
    top, bottom = (f([np.sum(w**2) for w in layers]) for f in (np.argmax, np.argmin))
    speed = [2 * np.sum(w * v) for w, v in zip(layers, velocity, strict=True)]
    total = flow_imbalance_drift(net.weights, arrays)
    assert_close([total], [speed[top] - speed[bottom]], size)
    if rate == 0.0:
        step = svag_or_order_two(problem, net, discrete=True)[0]
        assert_close(drift, step, size)


def complex_gradient(layers, sxx, syx):
    """The gradient without conjugation, for complex steps."""
    return reference.pull_back(layers, reference.end_to_end(layers) @ sxx - syx)


@pytest.mark.parametrize("noise", [Dropout(0.1), DropConnect(0.1), WeightNoise(0.1)])
@pytest.mark.parametrize("quantity", [expected_balancedness_drift, layer_drifts, imbalance_drift])
def test_noise_inside_the_network_has_no_closed_drift(noise, quantity):
    problem = gf.Problem(gf.Regression.from_samples(X, Y), [noise, gf.LabelNoise(0.1)])
    name = type(noise).__name__
    with pytest.raises(ValueError, match=rf"{quantity.__name__} covers .* not {name}, .* follow"):
        quantity(problem, network().weights, H, True)
