"""Laws of noise inside the network and on the gradient, and what these regularizers refuse."""

import itertools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import reference
from compiled import averages, compiled, draws, faces, sampled_gradients
from reference import as_numpy, assert_close, scale

import gradflow as gf
from gradflow.random.streams import Stream
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise
from gradflow.theory import flow_balancedness_drift

SXX = np.array([[1.3, 0.4], [0.4, 0.8]])
TARGET = np.array([[0.7, -1.1], [0.9, 0.6]])
DATA = gf.Regression.from_moments(SXX, TARGET @ SXX, TARGET @ SXX @ TARGET.T + 0.3 * np.eye(2))
SAMPLES = gf.Regression.from_samples(
    np.array([[1.0, 0.3], [-0.5, 1.2], [0.7, -0.8]]),
    np.array([[0.5, 0.2], [1.5, -0.3], [-1.0, 0.4]]),
)


def network(widths, seed=0):
    rng = np.random.default_rng(seed)
    return gf.DeepLinear([rng.normal(size=pair[::-1]) for pair in itertools.pairwise(widths)])


def extra_loss(net, *regularizers, data=DATA):
    """What regularizers add to the loss."""
    return averages(gf.Problem(data, regularizers), net.weights)[0] - gf.loss(net, data)


@compiled
def flow_drift(problem, weights):
    velocity = tuple(-g for g in problem.averaged_gradient(weights))
    return flow_balancedness_drift(weights, velocity)


# Closed forms of the expected loss


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_dropout_at_depth_two(kind):
    """(alpha/2) sum_k |W2[:, k]|^2 (W1 S W1^T)_kk with alpha = p / (1 - p)."""
    net = network((2, 3, 2))
    w1, w2 = as_numpy(net.weights)
    alpha = 0.2 / 0.8
    expected = alpha / 2 * np.sum(np.sum(w2**2, axis=0) * np.diag(w1 @ SXX @ w1.T))
    np.testing.assert_allclose(extra_loss(net, Dropout(0.2, kind)), expected, rtol=1e-12)


@pytest.mark.parametrize("layers", [[1], [2], None])
def test_dropout_at_depth_three(layers):
    net = network((2, 3, 2, 2))
    w1, w2, w3 = as_numpy(net.weights)
    alpha = 0.3 / 0.7
    one = np.sum(np.sum((w3 @ w2) ** 2, axis=0) * np.diag(w1 @ SXX @ w1.T))
    two = np.sum(np.sum(w3**2, axis=0) * np.diag(w2 @ w1 @ SXX @ w1.T @ w2.T))
    both = np.einsum("ak,kj,jj->", w3**2, w2**2, w1 @ SXX @ w1.T)
    parts = {(1,): alpha * one, (2,): alpha * two, None: alpha * (one + two) + alpha**2 * both}
    expected = parts[tuple(layers) if layers else None] / 2
    np.testing.assert_allclose(extra_loss(net, Dropout(0.3, layers=layers)), expected, rtol=1e-12)


def test_dropout_of_single_units():
    """(prod (1 + alpha_l) - 1) sxx P^2 / 2, two kinds of factors on the second layer."""
    data, net = gf.Regression.from_moments([[1.7]], [[0.6]]), network((1, 1, 1, 1))
    p = reference.end_to_end(as_numpy(net.weights)).item()
    extra = extra_loss(net, Dropout(0.2), Dropout(0.5, "gaussian", layers=[2]), data=data)
    np.testing.assert_allclose(extra, (1.25 * 1.25 * 2.0 - 1.0) * 1.7 * p**2 / 2, rtol=1e-12)


def test_weight_noise_at_depth_two():
    """(s2/2) tr H + (s2^2/2) d_1 d_2 tr S."""
    net, s2 = network((2, 3, 2)), 0.3**2
    hessian = reference.hessian(as_numpy(net.weights), SXX, TARGET @ SXX)
    expected = s2 / 2 * np.trace(hessian) + s2**2 / 2 * 3 * 2 * np.trace(SXX)
    for anticorrelated in (False, True):
        noise = WeightNoise(0.3, anticorrelated)
        np.testing.assert_allclose(extra_loss(net, noise), expected, rtol=1e-11)


def test_drop_connect_on_the_last_layer_of_two():
    """(alpha/2) sum_k |W2[:, k]|^2 (W1 S W1^T)_kk: there it equals dropout."""
    net = network((2, 3, 2))
    w1, w2 = as_numpy(net.weights)
    expected = 0.125 * np.sum(np.sum(w2**2, axis=0) * np.diag(w1 @ SXX @ w1.T))
    np.testing.assert_allclose(extra_loss(net, DropConnect(0.2, layers=[2])), expected, rtol=1e-12)


def test_gradient_noise_leaves_the_loss_alone():
    net = network((2, 3, 2))
    assert float(extra_loss(net, GradientNoise(0.7))) == pytest.approx(0.0, abs=1e-14)


# Balancedness


@pytest.mark.parametrize(
    "noise", [Dropout(0.3), Dropout(0.3, layers=[1]), DropConnect(0.2)], ids=lambda r: str(r)[:12]
)
def test_averaged_dropout_conserves_the_diagonals_of_balancedness_alone(noise):
    net = network((2, 3, 2, 2))
    for drift in flow_drift(gf.Problem(DATA, [noise]), net.weights):
        size = scale(net.weights) ** 2
        assert_close([np.diag(drift)], [np.zeros(len(drift))], size, 1e-13)
        assert np.abs(drift).max() > 1e-3 or noise.layers == (1,)


def test_averaged_input_noise_conserves_balancedness():
    net = network((2, 3, 2, 2))
    drift = flow_drift(gf.Problem(DATA, [gf.InputNoise(0.6), gf.LabelNoise(0.5)]), net.weights)
    assert_close(drift, [np.zeros_like(d) for d in drift], scale(net.weights) ** 2, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("data", [DATA, SAMPLES], ids=["population", "samples"])
@pytest.mark.parametrize(
    "noise", [Dropout(0.3), Dropout(0.3, "gaussian"), DropConnect(0.2)], ids=["0/1", "z", "weights"]
)
def test_every_draw_of_dropout_moves_the_diagonals_at_second_order(noise, data):
    """diag(dG_i) = h^2 diag(g_{i+1}^T g_{i+1} - g_i g_i^T): W_{i+1}^T g_{i+1} and g_i W_i^T agree
    on the diagonal.
    """
    net, h = network((2, 3, 2, 2)), 0.1
    problem = gf.Problem(data, [noise, gf.LabelNoise(0.4)])
    stream = Stream(jax.random.key(3), jnp.arange(4), jnp.arange(1))
    drawn = jax.tree.map(lambda leaf: leaf[..., 0], draws(problem, stream, net.widths))
    layers = as_numpy(net.weights)
    for flat in np.asarray(sampled_gradients(problem, net.weights, drawn)):
        cuts = np.cumsum([w.size for w in layers])[:-1]
        g = [p.reshape(w.shape) for p, w in zip(np.split(flat, cuts), layers, strict=True)]
        after = reference.balancedness([w - h * v for w, v in zip(layers, g, strict=True)])
        before, second = reference.balancedness(layers), reference.balancedness(g)
        for a, b, s in zip(after, before, second, strict=True):
            assert_close([np.diag(a - b)], [h**2 * np.diag(s)], scale(layers, g))


def test_weight_noise_balances_two_layers():
    """dG/dt = 2 s2 (d_2 W1 S W1^T - tr(S) W2^T W2), every entry, at any weights."""
    net, s2 = network((2, 3, 2)), 0.4**2
    w1, w2 = as_numpy(net.weights)
    expected = 2 * s2 * (2 * w1 @ SXX @ w1.T - np.trace(SXX) * w2.T @ w2)
    for anticorrelated in (False, True):
        problem = gf.Problem(DATA, [WeightNoise(0.4, anticorrelated)])
        assert_close(flow_drift(problem, net.weights), [expected], scale(net.weights) ** 2)


def test_weight_noise_on_white_inputs_makes_balancedness_decay_as_a_whole():
    """-2 s2 c d G for S = c I and d_0 = d_2 = d."""
    data, net = gf.Regression.from_moments(1.5 * np.eye(2), TARGET), network((2, 3, 2))
    (drift,) = flow_drift(gf.Problem(data, [WeightNoise(0.4)]), net.weights)
    (g,) = reference.balancedness(as_numpy(net.weights))
    assert_close([drift], [-2 * 0.16 * 1.5 * 2 * g], scale(net.weights) ** 2)


@pytest.mark.slow
def test_single_dropped_units_rest_where_the_kept_ones_fit():
    """At P = (1 - p) T and y = T x every draw has zero gradient, so imbalance stays."""
    t, p = 1.5, 0.4
    data = gf.Regression.from_moments([[1.7]], [[1.7 * t]], n=3)
    rows = np.array([[1.0], [-0.5]])
    samples = gf.Regression.from_samples(rows, t * rows)
    w1 = 1.7
    weights = (jnp.array([[w1]]), jnp.array([[(1 - p) * t / w1]]))
    stream = Stream(jax.random.key(3), jnp.arange(20), jnp.arange(1))
    for source in (samples, data):
        for kind, rests in (("bernoulli", True), ("gaussian", False)):
            problem = gf.Problem(source, [Dropout(p, kind)])
            drawn = jax.tree.map(lambda leaf: leaf[..., 0], draws(problem, stream, (1, 1, 1)))
            g = np.asarray(sampled_gradients(problem, weights, drawn))
            assert np.abs(g).max() < 1e-14 if rests else np.abs(g).max() > 0.1


# Noise that stays in the weights


@pytest.mark.slow
def test_anticorrelated_noise_is_plain_noise_on_what_is_left_of_it():
    """Z = W - xi obeys Z+ = Z - h g(Z + xi), replayed in NumPy from the draws alone."""
    h, std, steps, key = 0.1, 0.3, 5, jax.random.key(4)
    net = network((2, 3, 2))
    problem = gf.Problem(DATA, [WeightNoise(std, anticorrelated=True), gf.WeightDecay(0.2)])
    assert problem.has_weight_shift and not gf.Problem(DATA, [WeightNoise(std)]).has_weight_shift
    run = gf.simulate(
        problem, net, gf.GradientDescent(h), steps=steps, replicas=2, key=key, save=steps + 1,
        observables=[],
    )  # fmt: skip
    drawn = draws(problem, Stream(key, jnp.arange(steps), jnp.arange(2)), net.widths)[0]
    for path in range(2):
        z, xi = as_numpy(net.weights), [np.zeros_like(w) for w in as_numpy(net.weights)]
        for k in range(steps):
            w = [a + b for a, b in zip(z, xi, strict=True)]
            g = reference.gradient(w, SXX, TARGET @ SXX)
            z = [a - h * (b + 0.2 * c) for a, b, c in zip(z, g, w, strict=True)]
            xi = [std * np.asarray(d[k, ..., path]) for d in drawn]
            expected = [a + b for a, b in zip(z, xi, strict=True)]
            assert_close([v[path, k + 1] for v in run.weights], expected, scale(expected))


def test_the_gradient_is_taken_at_the_weights_that_hold_the_noise():
    net = network((2, 3, 2))
    plain, anti = (gf.Problem(DATA, [WeightNoise(0.3, kind)]) for kind in (False, True))
    stream = Stream(jax.random.key(4), jnp.arange(1), jnp.arange(1))
    drawn = jax.tree.map(lambda leaf: leaf[..., 0], draws(anti, stream, net.widths))
    clean = reference.gradient(as_numpy(net.weights), SXX, TARGET @ SXX)
    at_weights = sampled_gradients(anti, net.weights, drawn)[0]
    assert_close([at_weights], [reference.flatten(clean)], scale(clean))
    one = jax.tree.map(lambda leaf: leaf[0], drawn)
    shift = anti.weight_shift(net.weights, one)
    assert_close(shift, [0.3 * d for d in one[0]], 1.0, 1e-15)
    assert not np.any(plain.weight_shift(net.weights, one)[0])
    moved = tuple(w + s for w, s in zip(net.weights, shift, strict=True))
    at_moved = sampled_gradients(anti, moved, drawn)[0]
    assert_close([sampled_gradients(plain, net.weights, drawn)[0]], [at_moved], scale([at_moved]))


# Noise on the gradient


def test_gradient_noise_is_isotropic():
    """Its covariance is s^2 I, on top of that of the data noise."""
    net = network((2, 1, 2))
    noises = [gf.LabelNoise(0.5), GradientNoise(0.3), gf.WeightDecay(0.1), GradientNoise(0.4)]
    problem = gf.Problem(DATA, noises)
    both = faces(problem, net.weights).columns
    data = faces(gf.Problem(DATA, noises[:1]), net.weights).columns
    assert_close([both.T @ both - data.T @ data], [0.25 * np.eye(4)], scale([both]))


@pytest.mark.slow
def test_a_gaussian_step_is_the_average_plus_the_factor_times_the_same_normals():
    net = network((2, 3, 2))
    stream = Stream(jax.random.key(4), jnp.arange(3), jnp.arange(1))
    for data in (DATA, SAMPLES):
        noises = [gf.WeightDecay(0.1), GradientNoise(0.3), gf.LabelNoise(0.5)]
        problem = gf.Problem(data, noises)
        assert problem.is_gaussian and problem.has_diffusion_factor and problem.has_gradient_noise
        drawn = jax.tree.map(lambda leaf: leaf[..., 0], draws(problem, stream, net.widths))
        normals = jax.tree.map(
            lambda leaf: leaf[1, ..., 0], compiled(problem.draw_normals)(stream, net.widths)
        )
        shapes = jax.tree.map(lambda leaf: leaf.shape, problem.normal_shapes(net.widths))
        assert jax.tree.map(lambda leaf: leaf.shape, normals) == shapes
        noise = reference.flatten(as_numpy(compiled(problem.noise)(net.weights, normals)))
        expected = averages(problem, net.weights)[1] + noise
        actual = sampled_gradients(problem, net.weights, drawn)[1]
        assert_close([actual], [expected], scale([actual]))
    for noise in (gf.Minibatch(2), gf.InputNoise(0.3), Dropout(0.1), WeightNoise(0.1)):
        problem = gf.Problem(SAMPLES, [noise])
        assert not problem.is_gaussian
        assert problem.has_diffusion_factor == isinstance(noise, gf.Minibatch | gf.InputNoise)
    assert gf.Problem(DATA, [gf.InputNoise(0.3)]).is_gaussian
    assert gf.Problem(DATA).gradient_noise(()) == ()


@pytest.mark.slow
def test_penalties_can_be_left_out():
    net = network((2, 3, 2))
    for noises in ([], [gf.LabelNoise(0.3)], [Dropout(0.2), gf.Minibatch(2)]):
        stream = Stream(jax.random.key(4), jnp.arange(1), jnp.arange(1))
        with_decay = gf.Problem(DATA, [*noises, gf.WeightDecay(0.3)])
        draw = jax.tree.map(lambda leaf: leaf[0, ..., 0], draws(with_decay, stream, net.widths))
        bare = with_decay.sampled_gradient(net.weights, draw, penalties=False)
        full = with_decay.sampled_gradient(net.weights, draw)
        expected = [g + 0.3 * np.asarray(w) for g, w in zip(bare, net.weights, strict=True)]
        assert_close(full, expected, scale(full))


@pytest.mark.slow
def test_every_noise_has_numbers_of_its_own():
    """They depend on its place alone, and not on the noises after it."""
    noises = [Dropout(0.2, "gaussian"), WeightNoise(0.3), GradientNoise(0.1), WeightNoise(0.2)]
    stream = Stream(jax.random.key(2), jnp.arange(20), jnp.arange(50))
    drawn = draws(gf.Problem(DATA, noises), stream, (2, 2, 2))
    flat = [np.asarray(leaf).ravel()[:4000] for leaf in jax.tree.leaves(drawn)]
    assert len(flat) == 1 + 2 + 2 + 2 + 1
    size = min(map(len, flat))
    correlations = np.corrcoef([leaf[:size] for leaf in flat]) - np.eye(len(flat))
    assert np.abs(correlations).max() < 5 / np.sqrt(size)
    fewer = draws(gf.Problem(DATA, noises[:2]), stream, (2, 2, 2))
    for a, b in zip(jax.tree.leaves(fewer[:2]), jax.tree.leaves(drawn[:2]), strict=True):
        assert np.array_equal(a, b)


def test_masks_are_dropped_at_their_rate():
    """200000 entries: within 4.5 standard errors of 0.3."""
    stream = Stream(jax.random.key(2), jnp.arange(100), jnp.arange(100))
    for noise in (Dropout(0.3), DropConnect(0.3, layers=[2])):
        problem = gf.Problem(DATA, [noise, gf.Minibatch(10)])
        kept = np.concatenate(
            [np.ravel(leaf) for leaf in jax.tree.leaves(draws(problem, stream, (2, 2, 2))[0])]
        )
        assert abs(kept.mean() - 0.7) < 4.5 * np.sqrt(0.21 / kept.size)
        assert kept.size >= 40000


# Refusals


@pytest.fixture
def without_type_checks():
    """As a user calls gradflow, whose own messages then speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dropout(1.0), ValueError, "Dropout.rate is the probability to drop and must lie"),
        (lambda: Dropout(-0.1), ValueError, "Dropout.rate must be a finite number >= 0; got -0.1."),
        (lambda: DropConnect(1.5), ValueError, "DropConnect.rate is the probability to drop"),
        (lambda: WeightNoise(-1.0), ValueError, "WeightNoise.std must be a finite number >= 0"),
        (lambda: GradientNoise(-1.0), ValueError, "GradientNoise.std must be a finite number >= 0"),
        (lambda: Dropout(0.1, "uniform"), ValueError, "Dropout.distribution must be"),
        (lambda: WeightNoise(0.1, 1), TypeError, "WeightNoise.anticorrelated must be True or"),
        (lambda: Dropout(0.1, layers=[]), ValueError, "Dropout.layers must be a list of distinct"),
        (lambda: Dropout(0.1, layers=[1, 1]), ValueError, "got (1, 1)."),
        (lambda: DropConnect(0.1, layers=2), ValueError, "DropConnect.layers must be a list"),
        (lambda: WeightNoise(0.1, layers=[0]), ValueError, "WeightNoise.layers must be a list"),
        (lambda: WeightNoise(0.1, layers=[1.5]), ValueError, "got (1.5,)."),
    ],
)
def test_refused_arguments(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_layers_are_kept_in_order():
    assert DropConnect(0.1, layers=[3, 1]).layers == (1, 3)
    assert Dropout(0.1, layers=np.array([2, 1])).layers == (1, 2)
    assert WeightNoise(0.1, layers=range(1, 3)).layers == (1, 2)


@pytest.mark.parametrize(
    ("noise", "widths", "message"),
    [
        (Dropout(0.1), (2, 2), "a network of depth 1 has none"),
        (Dropout(0.1, layers=[1, 2]), (2, 3, 2), "2 is not a hidden layer of a network of depth 2"),
        (DropConnect(0.1, layers=[3]), (2, 3, 2), "there is no layer 3 in a network of depth 2"),
        (WeightNoise(0.1, layers=[3]), (2, 3, 2), "choose from 1 to 2."),
    ],
)
def test_layers_that_a_network_does_not_have(noise, widths, message):
    problem, net = gf.Problem(DATA, [noise]), network(widths)
    stream = Stream(jax.random.key(0), jnp.arange(1), jnp.arange(1))
    for use in (
        lambda: problem.averaged_loss(net.weights),
        lambda: problem.averaged_gradient(net.weights),
        lambda: problem.draw(stream, net.widths),
        lambda: problem.sampled_gradient(net.weights, (None, None)),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()


def test_noise_inside_the_network_has_no_closed_factor():
    problem, net = gf.Problem(DATA, [Dropout(0.1), WeightNoise(0.1)]), network((2, 3, 2))
    stream = Stream(jax.random.key(0), jnp.arange(1), jnp.arange(1))
    for use in (
        lambda: problem.normal_shapes(net.widths),
        lambda: problem.draw_normals(stream, net.widths),
        lambda: problem.noise(net.weights, ((), ())),
    ):
        with pytest.raises(
            ValueError, match=r"Dropout, WeightNoise acts inside .*\.centred_gradient"
        ):
            use()
    assert problem.is_stochastic and not problem.has_diffusion_factor
    assert len(problem.layer_noise) == 2 and problem.minibatch is None


def test_strengths_are_traced():
    """A sweep over rates and levels does not recompile."""
    net, traces = network((2, 3, 2)), []

    @jax.jit
    def value(rate):
        traces.append(rate)
        noises = [Dropout(rate), DropConnect(rate), WeightNoise(rate), GradientNoise(rate)]
        return gf.Problem(DATA, noises).averaged_loss(net.weights)

    assert value(0.1) < value(0.2)
    assert len(traces) == 1
