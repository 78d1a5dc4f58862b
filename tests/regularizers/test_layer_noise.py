"""Noise inside the network and on the gradient: its faces, held together by listing every draw.

The expected loss and gradient of a draw are at most quadratic in every single random number, so two
values of each (dropped or not, -1 or 1) average them exactly, and three Gauss-Hermite nodes average
their products. NumPy runs the forward pass of every draw.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import averages, inner_faces, sampled_gradients
from reference import as_numpy, assert_close, mean_and_covariance, scale

import gradflow as gf
from gradflow.random.streams import Stream
from gradflow.regularizers import DropConnect, Dropout, GradientNoise, WeightNoise

ONE_ROW = (np.array([[1.2]]), np.array([[-0.7]]))
TWO_ROWS = (np.array([[1.2], [0.4]]), np.array([[-0.7], [0.9]]))
WIDE = (np.array([[1.2, -0.6]]), np.array([[-0.7]]))

CONNECT, NOISE = DropConnect(0.2), WeightNoise(0.3)
ANTI = WeightNoise(0.4, anticorrelated=True, layers=[1])

CASES = {
    "weight noise": (WIDE, (2, 2, 1), [NOISE]),
    "weight noise, depth 3": (ONE_ROW, (1, 2, 2, 1), [NOISE]),
    "weight noise on one layer": (TWO_ROWS, (1, 2, 2, 1), [WeightNoise(0.5, layers=[2])]),
    "DropConnect, depth 1": (WIDE, (2, 1), [CONNECT]),
    "DropConnect, depth 3": (ONE_ROW, (1, 2, 2, 1), [CONNECT]),
    "DropConnect on two layers": (TWO_ROWS, (1, 2, 2, 1), [DropConnect(0.4, layers=(3, 1))]),
    "dropout": (TWO_ROWS, (1, 3, 1), [Dropout(0.25)]),
    "dropout, depth 3": (ONE_ROW, (1, 2, 2, 1), [Dropout(0.25), gf.WeightDecay(0.3)]),
    "dropout on one layer": (TWO_ROWS, (1, 2, 2, 1), [Dropout(0.4, layers=[2])]),
    "Gaussian dropout": (TWO_ROWS, (1, 2, 2, 1), [Dropout(0.25, "gaussian")]),
    "two dropouts": (ONE_ROW, (1, 2, 1), [Dropout(0.25), Dropout(0.5, "gaussian")]),
    "noise, then DropConnect": (ONE_ROW, (1, 2, 1), [NOISE, CONNECT]),
    "DropConnect, then noise": (ONE_ROW, (1, 2, 1), [CONNECT, NOISE]),
    "DropConnect, anticorrelated": (ONE_ROW, (1, 2, 1), [CONNECT, ANTI, gf.WeightDecay(0.3)]),
    "anticorrelated": (ONE_ROW, (1, 2, 1), [WeightNoise(0.3, anticorrelated=True), NOISE]),
    "gradient, dropout": (ONE_ROW, (1, 2, 1), [GradientNoise(0.6), Dropout(0.25)]),
    "inputs and labels": (
        ONE_ROW,
        (1, 2, 1),
        [gf.InputNoise(0.4), Dropout(0.25), gf.WeightDecay(0.2), gf.LabelNoise(0.5), NOISE],
    ),
    "batch": (TWO_ROWS, (1, 2, 1), [gf.Minibatch(1), Dropout(0.25), gf.InputNoise(0.4), CONNECT]),
    "batch, weights, labels": (
        TWO_ROWS,
        (1, 2, 1),
        [gf.LabelNoise(0.5), NOISE, gf.Minibatch(2, replacement=True), gf.InputNoise(0.4)],
    ),
}


def network(widths):
    rng = np.random.default_rng(len(widths))
    return gf.DeepLinear([rng.normal(size=pair[::-1]) for pair in itertools.pairwise(widths)])


def setting(name):
    (x, y), widths, regularizers = CASES[name]
    return x, y, gf.Problem(gf.Regression.from_samples(x, y), regularizers), network(widths)


def every_draw(problem, net, nodes=2):
    """Every draw with `nodes` values of each normal and each choice, and its probability."""
    key = jax.random.key_data(jax.random.key(0))
    one = jnp.zeros((1,), jnp.uint32)
    drawn = eqx.filter_eval_shape(
        lambda k, s, p: problem.draw(Stream(k, s, p), net.widths), key, one, one
    )
    hermite, chance_of_node = np.polynomial.hermite_e.hermegauss(nodes)
    rates = [float(getattr(r, "rate", 0.0)) for r in problem.regularizers]
    leaves, weights = [], []
    for part, rate in itertools.zip_longest(drawn, rates):  # a pseudo row may come last
        for leaf in jax.tree.leaves(part):
            size = int(np.prod(leaf.shape[1:-1]))
            if leaf.dtype == jnp.bool_:
                values, chances = [False, True], [rate, 1.0 - rate]
            elif jnp.issubdtype(leaf.dtype, jnp.integer):
                values, chances = [0, 1], [0.5, 0.5]
            else:
                values, chances = hermite, chance_of_node / chance_of_node.sum()
            leaves.append(np.array(list(itertools.product(values, repeat=size))))
            weights.append(np.prod(list(itertools.product(chances, repeat=size)), axis=1))
    index = np.array(list(itertools.product(*[range(len(w)) for w in weights])))
    chance = np.prod([w[index[:, i]] for i, w in enumerate(weights)], axis=0)
    shaped = [
        values[index[:, i]].reshape(-1, *leaf.shape[1:-1])
        for i, (values, leaf) in enumerate(zip(leaves, jax.tree.leaves(drawn), strict=True))
    ]
    np.testing.assert_allclose(chance.sum(), 1.0)
    return jax.tree.unflatten(jax.tree.structure(drawn), shaped), chance


# The noises in NumPy


def acts(r, layer):
    return r.layers is None or layer in r.layers


def shaken(layers, pairs):
    """The layers under one draw; noise that stays in the weights comes first."""
    first = [p for p in pairs if getattr(p[0], "anticorrelated", False)]
    for r, d in first + [p for p in pairs if p not in first]:
        for layer, w in enumerate(layers, start=1):
            if isinstance(r, WeightNoise) and acts(r, layer):
                w = w + float(r.std) * d[layer - 1]
            if isinstance(r, DropConnect) and acts(r, layer):
                w = w * d[layer - 1] / (1.0 - float(r.rate))
            layers = [*layers[: layer - 1], w, *layers[layer:]]
    return layers


def loss_of_rows(layers, x, y, pairs):
    """The loss of rows whose hidden activations are multiplied by the factors of one draw."""
    h = x.T
    for layer, w in enumerate(layers, start=1):
        h = w @ h
        for r, d in pairs:
            if isinstance(r, Dropout) and layer < len(layers) and acts(r, layer):
                rate, z = float(r.rate), d[layer - 1].T
                gaussian = r.kind == "gaussian"
                h = h * (1.0 + np.sqrt(rate / (1.0 - rate)) * z if gaussian else z / (1.0 - rate))
    return np.sum((h - y.T) ** 2) / (2 * len(x))


def loss_of_draw(layers, x, y, pairs):
    """The loss of one draw; holomorphic in the layers."""
    for r, d in pairs:
        if isinstance(r, gf.Minibatch):
            x, y = x[d], y[d]
    for r, d in pairs:
        if isinstance(r, gf.InputNoise):
            x = x + float(r.std) * d
        if isinstance(r, gf.LabelNoise):
            y = y + float(r.std) * d
    return loss_of_rows(shaken(layers, pairs), x, y, pairs)


def gradient_of_draw(layers, x, y, pairs):
    """Of the loss, the penalties and the noise on the gradient, as a vector."""
    total = reference.flatten(
        reference.complex_step_gradient(lambda w: loss_of_draw(w, x, y, pairs), layers)
    )
    kept = [p for p in pairs if getattr(p[0], "anticorrelated", False)]
    for r, d in pairs:
        if isinstance(r, GradientNoise):
            total = total + float(r.std) * reference.flatten(d)
        if isinstance(r, gf.WeightDecay):
            total = total + float(r.rate) * reference.flatten(shaken(layers, kept))
    return total


# Finite samples


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_averaged_and_sampled_faces(name):
    x, y, problem, net = setting(name)
    layers, regularizers = as_numpy(net.weights), problem.regularizers
    drawn, chance = every_draw(problem, net)
    each = [
        list(zip(regularizers, jax.tree.map(lambda leaf, q=q: leaf[q], drawn), strict=True))
        for q in range(len(chance))
    ]
    face = inner_faces(problem, net.weights, drawn)
    gradients, slope = np.asarray(face.gradients), np.asarray(face.gradient)
    assert_close([chance @ gradients], [slope], scale([slope, gradients.max()]))
    assert_close([face.centred], [gradients - slope], scale([gradients.max()]))
    for q in (0, len(each) // 3, len(each) - 1):
        one = gradient_of_draw(layers, x, y, each[q])
        assert_close([gradients[q]], [one], scale([one]))
    losses = np.array([loss_of_draw(layers, x, y, pairs) for pairs in each])
    rate = sum(float(r.rate) for r in regularizers if isinstance(r, gf.WeightDecay))
    noise = sum(float(r.std) ** 2 for r in regularizers if isinstance(r, gf.LabelNoise))
    expected = chance @ losses - noise / 2 + rate / 2 * np.sum(reference.flatten(layers) ** 2)
    assert_close([face.loss], [expected], scale(layers, [losses]))


@pytest.mark.parametrize(
    ("noise", "population"),
    [(NOISE, False), (NOISE, True), (CONNECT, False), (DropConnect(0.2, layers=[1]), True)],
    ids=["weights", "weights, population", "DropConnect", "DropConnect, population"],
)
def test_covariance_with_noise_on_the_weights(noise, population):
    """Cov of the mean gradient over draws of the weights, plus the mean Cov of the labels.

    The labels of a full batch enter through the moments, at the perturbed weights.
    """
    x, y = np.array([[1.0, 0.3], [-0.5, 1.2], [0.7, -0.8]]), np.array([[0.5], [1.5], [-1.0]])
    s, n, net = 0.7, 3, network((2, 1, 1))
    sxx, syx = x.T @ x / n, y.T @ x / n
    if population:
        data = gf.Regression.from_moments(sxx, syx, y.T @ y / n, n=n)
    else:
        data = gf.Regression.from_samples(x, y)
    problem = gf.Problem(data, [noise, gf.LabelNoise(s)])
    drawn, chance = every_draw(problem, net, nodes=3)
    actual = mean_and_covariance(np.asarray(sampled_gradients(problem, net.weights, drawn)), chance)

    shapes = [w.shape for w in net.weights]
    sizes = [int(np.prod(shape)) for shape in shapes]
    hermite, weights = np.polynomial.hermite_e.hermegauss(3)
    rate = float(getattr(noise, "rate", 0.0))
    values, chances = (
        (hermite, weights / weights.sum())
        if isinstance(noise, WeightNoise)
        else ([0.0, 1.0], [rate, 1.0 - rate])
    )
    first, second = np.zeros(3), np.zeros((3, 3))
    for picks in itertools.product(range(len(values)), repeat=sum(sizes)):
        flat = np.array([values[i] for i in picks])
        draw = [p.reshape(s) for p, s in zip(np.split(flat, [sizes[0]]), shapes, strict=True)]
        at = shaken(as_numpy(net.weights), [(noise, draw)])
        back = np.ones(3)
        if isinstance(noise, DropConnect):
            back = reference.flatten(shaken([np.ones(shape) for shape in shapes], [(noise, draw)]))
        jacobian = back[:, None] * reference.jacobian(at)
        mean = jacobian @ (reference.end_to_end(at) @ sxx - syx).ravel()
        covariance = jacobian @ (s**2 / n * sxx) @ jacobian.T
        weight = np.prod([chances[i] for i in picks])
        first += weight * mean
        second += weight * (np.outer(mean, mean) + covariance)
    expected = [first, second - np.outer(first, first)]
    assert_close(actual, expected, scale(expected))


# Populations


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_dropout_on_a_population_has_the_covariance_of_the_noise_of_n_samples(kind):
    """Given the weights E_x Cov[g | x] / n, and on top the covariance of noise on the weights."""
    sxx, t, residual, n = 1.3, 0.7, 0.5, 3
    data = gf.Regression.from_moments([[sxx]], [[t * sxx]], [[t**2 * sxx + residual]], n=n)
    connect, dropout = DropConnect(0.2, layers=[1]), Dropout(0.25, kind)
    labels, inputs = gf.LabelNoise(0.5), gf.InputNoise(0.3)
    regularizers = [connect, gf.WeightDecay(0.3), dropout, labels]
    if kind == "bernoulli":
        regularizers.append(inputs)
    problem, net = gf.Problem(data, regularizers), network((1, 2, 1))
    drawn, chance = every_draw(problem, net, nodes=3)
    layers = as_numpy(net.weights)
    mean, covariance = mean_and_covariance(
        np.asarray(sampled_gradients(problem, net.weights, drawn)), chance
    )
    averaged = np.asarray(averages(problem, net.weights)[1])
    size = scale([averaged, covariance])
    assert_close([mean], [averaged], size)

    hermite, weights = np.polynomial.hermite_e.hermegauss(3)
    nodes = list(zip(hermite, weights / weights.sum(), strict=True))
    factors = [(0.0, 0.25), (1.0, 0.75)] if kind == "bernoulli" else nodes
    noises = list(
        itertools.product(factors, factors, nodes, nodes if inputs in regularizers else [(0.0, 1)])
    )
    chances = np.array([np.prod([c for _, c in noise]) for noise in noises])
    first, second = np.zeros(4), np.zeros((4, 4))
    for one, other in itertools.product([(0.0, 0.2), (1.0, 0.8)], repeat=2):
        mask = [np.array([[one[0]], [other[0]]]), np.ones((1, 2))]
        at = shaken(layers, [(connect, mask)])
        back = np.array([one[0] / 0.8, other[0] / 0.8, 1.0, 1.0])
        for (z, chance_z), (e, chance_e) in itertools.product(nodes, nodes):
            x = np.sqrt(sxx) * z
            y = t * x + np.sqrt(residual) * e
            each = []
            for (f1, _), (f2, _), (label, _), (shift, _) in noises:
                pairs = [(dropout, [np.array([[f1, f2]])])]
                noisy = (np.array([[x + 0.3 * shift]]), np.array([[y + 0.5 * label]]))
                slope = dropped_gradient(at, *noisy, pairs)
                each.append(back * slope)
            given_row = mean_and_covariance(np.array(each), chances)
            weight = one[1] * other[1] * chance_z * chance_e
            first += weight * given_row[0]
            second += weight * given_row[1] / n
        # The mean over rows does not fluctuate, that over draws of the weights does.
        given_weights = back * reference.flatten(
            as_numpy(
                gf.Problem(
                    data, [r for r in regularizers if isinstance(r, Dropout | gf.InputNoise)]
                ).averaged_gradient(tuple(jnp.asarray(w) for w in at))
            )
        )
        second += one[1] * other[1] * np.outer(given_weights, given_weights)
    expected = second - np.outer(first, first)
    assert_close([covariance], [expected], size)
    assert_close([mean], [first + 0.3 * reference.flatten(layers)], size)


def dropped_gradient(layers, x, y, pairs):
    """The gradient of one row of a network (1, 2, 1) under dropout, by hand."""
    w1, w2 = layers
    (r, (z,)) = pairs[0]
    rate = float(r.rate)
    f = 1.0 + np.sqrt(rate / (1.0 - rate)) * z if r.kind == "gaussian" else z / (1.0 - rate)
    h = f.T * (w1 @ x)
    error = w2 @ h - y
    return np.concatenate([(f.T * (w2.T @ error) @ x).ravel(), (error @ h.T).ravel()])
