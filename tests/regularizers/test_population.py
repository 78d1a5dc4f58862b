"""The faces of noise on Gaussian populations, by quadrature over rows of Cholesky factors."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import faces, normal_leaves, sampled_gradients
from reference import as_numpy, assert_close, gauss_hermite, mean_and_covariance, scale

import gradflow as gf

ONE = {
    "sxx": np.array([[1.3]]),
    "target": np.array([[0.7], [-0.4]]),
    "residual": np.array([[0.5, 0.2], [0.2, 0.3]]),
    "widths": (1, 2, 2),
}
TWO = {
    "sxx": np.array([[1.3, 0.4], [0.4, 0.8]]),
    "target": np.array([[0.7, -1.1]]),
    "residual": np.array([[0.6]]),
    "widths": (2, 1, 2, 1),
}
LABELS, INPUTS = gf.LabelNoise(0.7), gf.InputNoise(0.4)


def setting(case, n=1):
    sxx, target, residual = case["sxx"], case["target"], case["residual"]
    data = gf.Regression.from_moments(sxx, target @ sxx, target @ sxx @ target.T + residual, n=n)
    rng = np.random.default_rng(3)
    shapes = itertools.pairwise(case["widths"])
    return data, gf.DeepLinear([rng.normal(size=shape[::-1]) for shape in shapes])


def one_sample(case, p, labels, inputs, fresh):
    """Mean and covariance of the gradient in P of one noisy sample, row-major.

    With `fresh` rows of the population the covariance is that over row and noise; otherwise that of
    the noise alone, averaged over the population.
    """
    sxx, target, residual = case["sxx"], case["target"], case["residual"]
    d_out, d_in = target.shape
    rows, row_weights = gauss_hermite(d_in + d_out, 3)
    noise, noise_weights = gauss_hermite(d_in + d_out, 3)
    x = rows[:, :d_in] @ np.linalg.cholesky(sxx).T
    y = x @ target.T + rows[:, d_in:] @ np.linalg.cholesky(residual).T
    noisy_x = x[:, None] + inputs * noise[None, :, :d_in]
    noisy_y = y[:, None] + labels * noise[None, :, d_in:]
    m = np.einsum("rqo,rqi->rqoi", noisy_x @ p.T - noisy_y, noisy_x).reshape(len(x), len(noise), -1)
    if fresh:
        weights = np.outer(row_weights, noise_weights).ravel()
        return mean_and_covariance(m.reshape(len(weights), -1), weights)
    each = [mean_and_covariance(values, noise_weights) for values in m]
    return tuple(
        np.tensordot(row_weights, np.stack(part), axes=1) for part in zip(*each, strict=True)
    )


@pytest.mark.few_cases(3)
@pytest.mark.parametrize("case", [ONE, TWO], ids=["one input", "two inputs"])
@pytest.mark.parametrize(
    "regularizers",
    [
        [LABELS],
        [INPUTS],
        [LABELS, INPUTS],
        [gf.Minibatch(1)],
        [gf.Minibatch(3)],
        [gf.Minibatch(2), LABELS],
        [INPUTS, gf.Minibatch(2)],
        [INPUTS, LABELS, gf.Minibatch(2), gf.WeightDecay(0.3)],
    ],
    ids=lambda r: "+".join(type(x).__name__ for x in r),
)
def test_covariance_and_averages(case, regularizers):
    """The mean over n = 3 samples, or over the fresh batch where there is one."""
    data, net = setting(case, n=3)
    problem = gf.Problem(data, regularizers)
    layers = as_numpy(net.weights)
    p = reference.end_to_end(layers)
    kinds = {type(r): r for r in regularizers}
    labels = float(LABELS.std) if gf.LabelNoise in kinds else 0.0
    inputs = float(INPUTS.std) if gf.InputNoise in kinds else 0.0
    batch = kinds.get(gf.Minibatch)
    mean, covariance = one_sample(case, p, labels, inputs, fresh=batch is not None)
    count = 3 if batch is None else batch.batch_size
    size = scale([mean, covariance], layers)
    face = faces(problem, net.weights)
    assert_close([face.covariance], [covariance / count], size)
    rate = float(kinds[gf.WeightDecay].rate) if gf.WeightDecay in kinds else 0.0
    expected = reference.jacobian(layers) @ mean + rate * reference.flatten(layers)
    assert_close([face.gradient], [expected], size)


@pytest.mark.parametrize(
    ("case", "regularizers", "points"),
    [
        (TWO, [gf.Minibatch(1)], (3,)),
        (TWO, [INPUTS, gf.Minibatch(1), LABELS], (3, 3, 2)),
        (ONE, [gf.Minibatch(2)], (3,)),
        (TWO, [LABELS, gf.WeightDecay(0.2), INPUTS], (2, 2)),
    ],
    ids=["online", "online, labels, inputs", "online, two rows", "Gaussian"],
)
def test_sampled_gradient_has_the_moments_of_the_population(case, regularizers, points):
    """Quadrature over the very normals that the sampled gradient takes."""
    data, net = setting(case)
    problem = gf.Problem(data, regularizers)
    layers = as_numpy(net.weights)
    batch = next((r.batch_size for r in regularizers if isinstance(r, gf.Minibatch)), None)
    if batch is None:
        shapes = [leaf.shape for leaf in normal_leaves(problem, net.weights)]
    else:
        shapes = [
            (batch, data.d_in + data.d_out)
            if isinstance(r, gf.Minibatch)
            else (batch, data.d_in if isinstance(r, gf.InputNoise) else data.d_out)
            for r in regularizers
        ]
    if batch is None:  # linear in every normal: unit vectors give the covariance
        sizes = [int(np.prod(s)) for s in shapes]
        nodes, weights = np.vstack([np.eye(sum(sizes)), -np.eye(sum(sizes))]), None
        parts = np.split(nodes, np.cumsum(sizes)[:-1], axis=1)
    else:
        rules = [gauss_hermite(int(np.prod(s)), q) for s, q in zip(shapes, points, strict=True)]
        index = np.array(list(itertools.product(*[range(len(w)) for _, w in rules])))
        parts = [nodes[index[:, i]] for i, (nodes, _) in enumerate(rules)]
        weights = np.prod([w[index[:, i]] for i, (_, w) in enumerate(rules)], axis=0)
    arrays = iter([part.reshape(-1, *s) for part, s in zip(parts, shapes, strict=True)])
    penalty = gf.WeightDecay
    draws = tuple(
        None if isinstance(r, penalty) else jnp.asarray(next(arrays)) for r in regularizers
    )
    flat = np.asarray(sampled_gradients(problem, net.weights, draws))
    if weights is None:
        mean = flat.mean(axis=0)
        covariance = (flat - mean).T @ (flat - mean) / 2
    else:
        mean, covariance = mean_and_covariance(flat, weights)

    labels = sum(float(r.std) for r in regularizers if isinstance(r, gf.LabelNoise))
    inputs = sum(float(r.std) for r in regularizers if isinstance(r, gf.InputNoise))
    rate = sum(float(r.rate) for r in regularizers if isinstance(r, gf.WeightDecay))
    p = reference.end_to_end(layers)
    m, c = one_sample(case, p, labels, inputs, fresh=batch is not None)
    jacobian = reference.jacobian(layers)
    expected = jacobian @ m + rate * reference.flatten(layers)
    size = scale([mean, covariance], layers)
    assert_close([mean], [expected], size)
    assert_close([covariance], [jacobian @ c @ jacobian.T / (batch or 1)], size)
