"""The three faces of noise on a finite sample, held together by enumerating every draw.

All batches are listed and every normal number is replaced by Gauss-Hermite nodes that integrate the
polynomials at hand exactly, so that means and covariances are exact. They are taken of gradients
that NumPy computes from the perturbed rows; gradflow's sampled gradient must equal these draw by
draw, its averaged loss and gradient their mean, and its diffusion factor their covariance.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import faces, normal_leaves, sampled_gradients
from reference import as_numpy, assert_close, gauss_hermite, mean_and_covariance, scale

import gradflow as gf
from gradflow.theory import noise_covariance

X = {
    (3, 1): np.array([[1.0], [-0.5], [2.0]]),
    (3, 2): np.array([[1.0, 0.3], [-0.5, 1.2], [0.7, -0.8]]),
    "singular": np.array([[1.0, 2.0], [-0.5, -1.0], [2.0, 4.0]]),
}
Y = {
    (3, 1): np.array([[0.5], [1.5], [-1.0]]),
    (3, 2): np.array([[0.5, -0.2], [1.5, 0.4], [-1.0, 0.9]]),
}
TWO_ONE = (X[3, 2], Y[3, 1], (2, 2, 1))
SINGULAR = (X["singular"], Y[3, 1], (2, 1, 1))
ONE_TWO = (X[3, 1], Y[3, 2], (1, 2, 1, 2))

LABELS, INPUTS, DECAY = gf.LabelNoise(0.7), gf.InputNoise(0.4), gf.WeightDecay(0.3)

CASES = {
    "labels": (TWO_ONE, [LABELS]),
    "labels, two outputs": (ONE_TWO, [DECAY, LABELS]),
    "inputs": (TWO_ONE, [INPUTS]),
    "inputs, singular": (SINGULAR, [INPUTS]),
    "inputs, labels": (ONE_TWO, [INPUTS, LABELS]),
    "two kinds of labels": (TWO_ONE, [LABELS, gf.LabelNoise(0.5)]),
    "batch": (ONE_TWO, [gf.Minibatch(2)]),
    "batch of one": (TWO_ONE, [gf.Minibatch(1), DECAY]),
    "full batch": (TWO_ONE, [gf.Minibatch(3)]),
    "replacement": (TWO_ONE, [gf.Minibatch(2, replacement=True)]),
    "large replacement": (SINGULAR, [gf.Minibatch(4, replacement=True)]),
    "batch, labels": (ONE_TWO, [LABELS, gf.Minibatch(2)]),
    "replacement, inputs": (SINGULAR, [gf.Minibatch(2, replacement=True), INPUTS]),
    "all": (TWO_ONE, [LABELS, gf.Minibatch(2), DECAY, INPUTS]),
    "all, replacement": (ONE_TWO, [gf.Minibatch(2, replacement=True), INPUTS, LABELS]),
}


def kinds(regularizers, kind):
    return [r for r in regularizers if isinstance(r, kind)]


def network(widths):
    rng = np.random.default_rng(sum(widths))
    return gf.DeepLinear([rng.normal(size=shape[::-1]) for shape in itertools.pairwise(widths)])


class Enumeration:
    """Every draw of the noises on a finite sample, with its probability."""

    def __init__(self, x, y, regularizers):
        n = len(x)
        rules = kinds(regularizers, gf.Minibatch)
        if rules:
            listed = reference.batches(n, rules[0].batch_size, rules[0].replacement)
            rows = np.array(list(listed))
        else:
            rows = np.arange(n)[None]
        size = rows.shape[1]
        widths = {gf.LabelNoise: y.shape[1], gf.InputNoise: x.shape[1]}
        points = {gf.LabelNoise: 2, gf.InputNoise: 3}  # the gradient is of degree 1 and 2 in them
        parts = [(rows, np.full(len(rows), 1.0 / len(rows)))]
        noises = kinds(regularizers, tuple(widths))
        parts += [gauss_hermite(size * widths[type(r)], points[type(r)]) for r in noises]
        index = np.array(list(itertools.product(*[range(len(w)) for _, w in parts])))
        self.weights = np.prod([w[index[:, i]] for i, (_, w) in enumerate(parts)], axis=0)
        chosen = rows[index[:, 0]]
        self.draws = {id(r): chosen for r in rules}
        self.x, self.y = x[chosen], y[chosen]
        for i, r in enumerate(noises, start=1):
            normals = parts[i][0][index[:, i]].reshape(len(index), size, -1)
            self.draws[id(r)] = normals
            if isinstance(r, gf.LabelNoise):
                self.y = self.y + float(r.std) * normals
            else:
                self.x = self.x + float(r.std) * normals

    def draw(self, regularizers):
        """What `Problem.sampled_gradient` takes, draws along the first axis."""
        return tuple(
            jnp.asarray(self.draws[id(r)]) if id(r) in self.draws else None for r in regularizers
        )

    def end_to_end_gradients(self, p):
        """(q, d_N, d_0)."""
        errors = self.x @ p.T - self.y
        return np.einsum("qbo,qbi->qoi", errors, self.x) / self.x.shape[1]


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_faces_agree(name):
    (x, y, widths), regularizers = CASES[name]
    net = network(widths)
    layers = as_numpy(net.weights)
    p = reference.end_to_end(layers)
    problem = gf.Problem(gf.Regression.from_samples(x, y), regularizers)
    rate = sum(float(r.rate) for r in kinds(regularizers, gf.WeightDecay))
    every = Enumeration(x, y, regularizers)
    ms = every.end_to_end_gradients(p)
    decay = rate * reference.flatten(layers)
    each = ms.reshape(len(ms), -1) @ reference.jacobian(layers).T + decay
    mean, covariance = mean_and_covariance(each, every.weights)
    size = scale([each.max(axis=0), covariance])

    through_rows = bool(kinds(regularizers, gf.Minibatch) or kinds(regularizers, gf.InputNoise))
    if through_rows:
        drawn = np.asarray(sampled_gradients(problem, net.weights, every.draw(regularizers)))
        assert_close([drawn], [each], size)
    else:
        shapes = [leaf.shape for leaf in normal_leaves(problem, net.weights)]
        nodes, weights = gauss_hermite(sum(int(np.prod(s)) for s in shapes), 2)
        cuts = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
        pieces = iter(np.split(nodes, cuts, axis=1))
        draws = tuple(
            jnp.asarray(next(pieces).reshape(-1, y.shape[1], x.shape[1]))
            if isinstance(r, gf.LabelNoise)
            else None
            for r in regularizers
        )
        drawn = np.asarray(sampled_gradients(problem, net.weights, draws))
        drawn_mean, drawn_covariance = mean_and_covariance(drawn, weights)
        assert_close([drawn_mean, drawn_covariance], [mean, covariance], size)

    face = faces(problem, net.weights)
    assert_close([face.gradient], [mean], size)
    assert_close([face.columns.T @ face.columns], [covariance], size)
    _, of_m = mean_and_covariance(ms.reshape(len(ms), -1), every.weights)
    assert_close([face.covariance], [of_m], size)

    losses = np.mean(np.sum((every.x @ p.T - every.y) ** 2, axis=2), axis=1) / 2
    constant = sum(float(r.std) ** 2 for r in kinds(regularizers, gf.LabelNoise)) * y.shape[1] / 2
    expected = every.weights @ losses - constant + rate / 2 * np.sum(reference.flatten(layers) ** 2)
    assert_close([face.loss], [expected], size)


@pytest.mark.few_cases(2)
@pytest.mark.parametrize("name", ["labels", "inputs, labels", "all", "replacement, inputs"])
def test_noise_is_linear_in_its_normals(name):
    (x, y, widths), regularizers = CASES[name]
    problem = gf.Problem(gf.Regression.from_samples(x, y), regularizers)
    net = network(widths)
    rng = np.random.default_rng(1)
    one, two = (
        jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), problem.normal_shapes(widths))
        for _ in range(2)
    )
    mixed = jax.tree.map(lambda a, b: 2.0 * a - 0.5 * b, one, two)
    first, second = (problem.noise(net.weights, normals) for normals in (one, two))
    expected = [2.0 * a - 0.5 * b for a, b in zip(first, second, strict=True)]
    assert_close(problem.noise(net.weights, mixed), expected, scale(expected))


def test_a_full_batch_without_replacement_has_no_noise():
    """Its gradient is the gradient of descent, whatever the order of the rows."""
    x, y, widths = TWO_ONE
    data, net = gf.Regression.from_samples(x, y), network(widths)
    for rows in itertools.permutations(range(3)):
        for rule in (gf.Minibatch(3), gf.Minibatch(3, reshuffled=True)):
            g = gf.Problem(data, [rule]).sampled_gradient(net.weights, (jnp.array(rows),))
            assert_close(g, gf.gradient(net, data), scale(g), 1e-15)
    factor = np.asarray(faces(gf.Problem(data, [gf.Minibatch(3)]), net.weights).columns)
    assert np.array_equal(factor, np.zeros_like(factor))


def test_a_problem_without_noise_has_no_covariance():
    x, y, widths = TWO_ONE
    data = gf.Regression.from_samples(x, y)
    for problem in (gf.Problem(data), gf.Problem(data, [DECAY])):
        assert not problem.is_stochastic
        assert problem.normal_shapes(widths) == ((), ())
        assert np.array_equal(noise_covariance(problem, network(widths).weights), np.zeros((2, 2)))
    assert gf.Problem(data, [DECAY, LABELS]).is_stochastic
