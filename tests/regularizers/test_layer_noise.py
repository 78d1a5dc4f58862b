"""Noise inside the network: the base class carries mechanisms that gradflow does not ship.

Three mechanisms are written here against `AbstractLayerNoise`. The expected loss of a draw is at
most quadratic in every single random number, so two values of each (0 and 1, or -1 and 1) average
it exactly; NumPy runs the forward pass of every draw.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import draws, sampled_gradients
from reference import as_numpy, assert_close, scale

import gradflow as gf
from gradflow.regularizers import AbstractLayerNoise
from gradflow.streams import Stream


class WeightNoise(AbstractLayerNoise):
    """W_l -> W_l + std xi, one draw a step."""

    std: float = 0.3

    @property
    def is_stochastic(self):
        return True

    def weight_variance(self, layer, depth, w, variance):
        return variance + self.std**2

    def activation_variance(self, layer, depth):
        return jnp.zeros(())

    def draw(self, stream, batch, widths):
        shapes = enumerate(itertools.pairwise(widths))
        return tuple(stream.substream(i).normals(shape[::-1]) for i, shape in shapes)

    def perturb_weight(self, draw, layer, depth, w):
        return w + self.std * draw[layer - 1]

    def perturb_activation(self, draw, layer, depth, h):
        return h


class DropConnect(AbstractLayerNoise):
    """Every weight is kept with probability `keep`, one draw a step."""

    keep: float = 0.8

    @property
    def is_stochastic(self):
        return True

    def weight_variance(self, layer, depth, w, variance):
        alpha = (1.0 - self.keep) / self.keep
        return variance + alpha * (variance + w**2)

    def activation_variance(self, layer, depth):
        return jnp.zeros(())

    def draw(self, stream, batch, widths):
        keep = jnp.asarray(self.keep)
        shapes = enumerate(itertools.pairwise(widths))
        return tuple(stream.substream(i).booleans(keep, shape[::-1]) for i, shape in shapes)

    def perturb_weight(self, draw, layer, depth, w):
        return w * draw[layer - 1] / self.keep

    def perturb_activation(self, draw, layer, depth, h):
        return h


class Dropout(AbstractLayerNoise):
    """Every hidden activation of every sample is kept with probability `keep`."""

    keep: float = 0.75

    @property
    def is_stochastic(self):
        return True

    def weight_variance(self, layer, depth, w, variance):
        return variance

    def activation_variance(self, layer, depth):
        return jnp.asarray((1.0 - self.keep) / self.keep if layer < depth else 0.0)

    def draw(self, stream, batch, widths):
        keep = jnp.asarray(self.keep)
        return tuple(
            stream.substream(i).booleans(keep, (batch, d)) for i, d in enumerate(widths[1:-1])
        )

    def perturb_weight(self, draw, layer, depth, w):
        return w

    def perturb_activation(self, draw, layer, depth, h):
        return h * draw[layer - 1] / self.keep if layer < depth else h


ONE_ROW = (np.array([[1.2]]), np.array([[-0.7]]))
TWO_ROWS = (np.array([[1.2], [0.4]]), np.array([[-0.7], [0.9]]))
WIDE = (np.array([[1.2, -0.6]]), np.array([[-0.7]]))

CASES = {
    "weight noise": (WIDE, (2, 2, 1), [WeightNoise()]),
    "weight noise, depth 3": (ONE_ROW, (1, 2, 2, 1), [WeightNoise()]),
    "DropConnect, depth 1": (WIDE, (2, 1), [DropConnect()]),
    "DropConnect, depth 3": (ONE_ROW, (1, 2, 2, 1), [DropConnect()]),
    "dropout": (TWO_ROWS, (1, 3, 1), [Dropout()]),
    "dropout, depth 3": (ONE_ROW, (1, 2, 2, 1), [Dropout(), gf.WeightDecay(0.3)]),
    "noise, then DropConnect": (ONE_ROW, (1, 2, 1), [WeightNoise(), DropConnect()]),
    "DropConnect, then noise": (ONE_ROW, (1, 2, 1), [DropConnect(), WeightNoise()]),
    "two dropouts": (ONE_ROW, (1, 2, 1), [Dropout(), Dropout(0.5)]),
    "inputs and labels": (
        ONE_ROW,
        (1, 2, 1),
        [gf.InputNoise(0.4), Dropout(), gf.WeightDecay(0.2), gf.LabelNoise(0.5), WeightNoise()],
    ),
    "batch": (TWO_ROWS, (1, 2, 1), [gf.Minibatch(1), Dropout(), gf.InputNoise(0.4)]),
}


def setting(name):
    (x, y), widths, regularizers = CASES[name]
    rng = np.random.default_rng(len(widths))
    shapes = itertools.pairwise(widths)
    net = gf.DeepLinear([rng.normal(size=shape[::-1]) for shape in shapes])
    return x, y, gf.Problem(gf.Regression.from_samples(x, y), regularizers), net


def two_valued_draws(problem, net):
    """Every draw in which each random number takes one of two values, and its probability."""
    key = jax.random.key_data(jax.random.key(0))
    one = jnp.zeros((1,), jnp.uint32)
    drawn = eqx.filter_eval_shape(
        lambda k, s, p: problem.draw(Stream(k, s, p), net.widths), key, one, one
    )
    keeps = [getattr(r, "keep", None) for r in problem.regularizers]
    leaves, weights = [], []
    for part, keep in zip(drawn, keeps, strict=True):
        for leaf in jax.tree.leaves(part):
            size = int(np.prod(leaf.shape[1:-1]))
            if leaf.dtype == jnp.bool_:
                values, chances = [False, True], [1.0 - keep, keep]
            elif jnp.issubdtype(leaf.dtype, jnp.integer):
                values, chances = [0, 1], [0.5, 0.5]
            else:
                values, chances = [-1.0, 1.0], [0.5, 0.5]
            leaves.append(np.array(list(itertools.product(values, repeat=size))))
            weights.append(np.prod(list(itertools.product(chances, repeat=size)), axis=1))
    index = np.array(list(itertools.product(*[range(len(w)) for w in weights])))
    chance = np.prod([w[index[:, i]] for i, w in enumerate(weights)], axis=0)
    shaped = [
        values[index[:, i]].reshape(-1, *leaf.shape[1:-1])
        for i, (values, leaf) in enumerate(zip(leaves, jax.tree.leaves(drawn), strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(drawn), shaped), chance


def loss_of_draw(layers, x, y, regularizers, draw):
    """The forward pass of one draw in NumPy; holomorphic in the layers."""
    for r, d in zip(regularizers, draw, strict=True):
        if isinstance(r, gf.Minibatch):
            x, y = x[d], y[d]
    for r, d in zip(regularizers, draw, strict=True):
        if isinstance(r, gf.InputNoise):
            x = x + float(r.std) * d
        if isinstance(r, gf.LabelNoise):
            y = y + float(r.std) * d
    h, depth = x.T, len(layers)
    for layer, w in enumerate(layers, start=1):
        for r, d in zip(regularizers, draw, strict=True):
            if isinstance(r, AbstractLayerNoise):
                w = r.perturb_weight(d, layer, depth, w)
        h = w @ h
        for r, d in zip(regularizers, draw, strict=True):
            if isinstance(r, AbstractLayerNoise):
                h = r.perturb_activation(d, layer, depth, h.T).T
    return np.sum((h - y.T) ** 2) / (2 * len(x))


@pytest.mark.parametrize("name", CASES)
def test_averaged_and_sampled_faces(name):
    x, y, problem, net = setting(name)
    layers, regularizers = as_numpy(net.weights), problem.regularizers
    every, chance = two_valued_draws(problem, net)
    np.testing.assert_allclose(chance.sum(), 1.0)
    each = [jax.tree.map(lambda leaf, q=q: leaf[q], every) for q in range(len(chance))]
    losses = np.array([loss_of_draw(layers, x, y, regularizers, draw) for draw in each])
    rate = sum(float(r.rate) for r in regularizers if isinstance(r, gf.WeightDecay))
    noise = sum(float(r.std) ** 2 for r in regularizers if isinstance(r, gf.LabelNoise))
    expected = chance @ losses - noise / 2 + rate / 2 * np.sum(reference.flatten(layers) ** 2)
    size = scale(layers, [losses])
    assert_close([problem.averaged_loss(net.weights)], [expected], size)

    gradients = np.asarray(sampled_gradients(problem, net.weights, every))
    averaged = reference.flatten(as_numpy(problem.averaged_gradient(net.weights)))
    assert_close([chance @ gradients], [averaged], scale([averaged, gradients.max()]))
    for q in (0, len(each) // 3, len(each) - 1):
        slope = reference.complex_step_gradient(
            lambda w, q=q: loss_of_draw(w, x, y, regularizers, each[q]), layers
        )
        one = reference.flatten([g + rate * w for g, w in zip(slope, layers, strict=True)])
        assert_close([gradients[q]], [one], scale([one]))


def test_closed_form_of_dropout():
    """Depth 2: (alpha/2) sum_k |W2[:, k]|^2 (W1 S W1^T)_kk."""
    x, _, problem, net = setting("dropout")
    w1, w2 = as_numpy(net.weights)
    alpha = 0.25 / 0.75
    spread = np.diag(w1 @ (x.T @ x / 2) @ w1.T)
    extra = alpha / 2 * np.sum(np.sum(w2**2, axis=0) * spread)
    plain = gf.loss(net, problem.data)
    np.testing.assert_allclose(problem.averaged_loss(net.weights), plain + extra, rtol=1e-13)


def test_closed_form_of_weight_noise():
    """Depth 2: (s2/2) tr H + (s2^2/2) d_1 d_2 tr S."""
    x, y, problem, net = setting("weight noise")
    s2 = 0.3**2
    hessian = reference.hessian(as_numpy(net.weights), x.T @ x, y.T @ x)
    extra = s2 / 2 * np.trace(hessian) + s2**2 / 2 * 2 * 1 * np.sum(x**2)
    plain = gf.loss(net, problem.data)
    np.testing.assert_allclose(problem.averaged_loss(net.weights), plain + extra, rtol=1e-13)


def test_dropout_conserves_the_diagonals_of_balancedness():
    """Both on average and for every draw: diag(W_{i+1}^T g_{i+1}) = diag(g_i W_i^T)."""
    _, _, problem, net = setting("dropout")
    every, _ = two_valued_draws(problem, net)
    some = jax.tree.map(lambda leaf: leaf[5], every)
    for g in (
        problem.averaged_gradient(net.weights),
        problem.sampled_gradient(net.weights, some),
    ):
        above = np.diag(np.asarray(net.weights[1].T @ g[1]))
        below = np.diag(np.asarray(g[0] @ net.weights[0].T))
        assert_close([above], [below], scale(net.weights, g))


def test_drawn_noise_trains():
    """One step of every replica is the sampled gradient of the draw at its step and path."""
    *_, problem, net = setting("batch")
    problem = gf.Problem(problem.data, [*problem.regularizers, WeightNoise()])
    key = jax.random.key(5)
    run = gf.simulate(
        problem, net, gf.GradientDescent(0.1), steps=3, replicas=4, key=key, save=4, observables=[]
    )
    drawn = draws(problem, Stream(key, jnp.arange(3), jnp.arange(4)), net.widths)
    for k in range(3):
        draw = jax.tree.map(lambda leaf, k=k: np.moveaxis(leaf[k], -1, 0), drawn)
        before, after = ([w[:, k + i] for w in run.weights] for i in range(2))
        for path in range(4):
            g = jax.tree.map(lambda leaf, p=path: leaf[p : p + 1], draw)
            weights = tuple(jnp.asarray(w[path]) for w in before)
            expected = reference.flatten([w[path] for w in before]) - 0.1 * np.asarray(
                sampled_gradients(problem, weights, g)
            )
            actual = reference.flatten([w[path] for w in after])
            assert_close([actual], [expected[0]], scale([actual]))


def test_populations_have_no_rows_to_perturb():
    data = gf.Regression.whitened([[1.0]])
    stream = Stream(jax.random.key(0), jnp.arange(1), jnp.arange(1))
    with pytest.raises(
        ValueError, match=r"data: Dropout perturbs rows of data.*add Minibatch\(batch_size\)"
    ):
        gf.Problem(data, [Dropout()]).draw(stream, (1, 2, 1))
    online = gf.Problem(data, [Dropout(), gf.Minibatch(2)])
    assert draws(online, stream, (1, 2, 1))[0][0].shape == (1, 2, 2, 1)


def test_noise_inside_the_network_has_no_end_to_end_factor():
    problem = gf.Problem(gf.Regression.whitened([[1.0]]), [Dropout(), WeightNoise()])
    with pytest.raises(ValueError, match=r"Dropout, WeightNoise acts inside the network"):
        problem.normal_shapes()
    assert problem.is_stochastic
    assert len(problem.layer_noise) == 2 and problem.minibatch is None
