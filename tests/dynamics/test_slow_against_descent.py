"""The slow flow against simulated SGD: where G is after many steps, to 3 standard errors or 1 %.

Noise levels are chosen so that G moves by about half in the run: the standard errors of its mean
over the replicas are 0.02 to 0.5 % of the displacement, and the next order in the noise, of the
order of the variance of P about its target, is below 0.1 % of it.
"""

import itertools

import jax
import numpy as np
import pytest
import reference
import training

import gradflow as gf
from gradflow.dynamics.slow_flow import SlowFlow

STEPS = 20_000
ROWS = 12
BATCH = 8  # of 12: with 4, SGD with momentum 0.9 is unstable in mean square at h lam_max = 1

SCALAR = {2: [1.5, 0.8], 3: [1.4, 0.8, 1.0], 4: [1.3, 0.8, 1.1, 0.9]}
MATRIX = {2: (2, 3, 2), 3: (2, 2, 3, 2)}


def network(kind):
    """The layers of a scalar or matrix network of some depth."""
    name, depth = kind
    if name == "scalar":
        return [np.array([[w]]) for w in SCALAR[depth]]
    rng = np.random.default_rng(depth)
    widths = MATRIX[depth]
    sizes = [1.3, 0.7, 1.0]
    return [
        size * np.linalg.qr(rng.standard_normal((max(b, a), max(b, a))))[0][:b, :a]
        + 0.2 * rng.standard_normal((b, a))
        for (a, b), size in zip(itertools.pairwise(widths), sizes, strict=False)
    ]


def samples(layers, residual):
    """Rows whose best map is the network, with residuals of the given size."""
    rng = np.random.default_rng(0)
    d_in, d_out = layers[0].shape[1], layers[-1].shape[0]
    x = rng.standard_normal((ROWS, d_in))
    e = rng.standard_normal((ROWS, d_out))
    e = e - x @ np.linalg.lstsq(x, e, rcond=None)[0]
    e = residual * e / np.sqrt(np.mean(e**2))
    return gf.Regression.from_samples(x, x @ reference.end_to_end(layers).T + e), x


def training_of(noise, layers, h_lam, momentum):
    """A problem with the noise at the level that moves G by about half, and the step size."""
    _, x = samples(layers, 0.0)
    sxx = x.T @ x / ROWS
    lam = np.linalg.eigvalsh(reference.hessian(layers, sxx, reference.end_to_end(layers) @ sxx))[-1]
    h = h_lam / lam
    level = (1.0 - momentum) * np.sqrt(0.4 / STEPS) / h
    fraction = (ROWS - BATCH) / (BATCH * (ROWS - 1))
    size = np.sqrt(np.mean(reference.end_to_end(layers) ** 2))
    if noise == "minibatch":
        data, _ = samples(layers, level / np.sqrt(fraction))
        return gf.Problem(data, [gf.Minibatch(BATCH)]), h
    data, _ = samples(layers, 0.0)
    std = level * np.sqrt(ROWS)
    regularizer = gf.LabelNoise(std) if noise == "label" else gf.InputNoise(std / size)
    return gf.Problem(data, [regularizer]), h


def assert_agree(problem, net, h, momentum, replicas, seed=0, steps=STEPS):
    """Displacements of every tr G_i from the projected start agree; return the largest."""
    dynamics = SlowFlow(h, momentum=momentum)
    spread = {"replicas": replicas, "key": jax.random.key(seed + 1)}
    options = spread if dynamics.is_random(problem) else {}
    slow = gf.simulate(problem, net, dynamics, steps=steps, save=2, **options)
    sgd = gf.simulate(
        problem,
        net,
        gf.GradientDescent(h, momentum),
        steps=steps,
        save=2,
        replicas=replicas,
        key=jax.random.key(seed),
    )

    def traces(run):
        return np.stack([np.trace(g, axis1=-2, axis2=-1) for g in training.gram_path(run.weights)])

    of_slow, of_sgd = traces(slow), traces(sgd)[..., -1]
    before, after, error = of_slow[..., 0], of_slow[..., -1], np.std(of_sgd, axis=1) ** 2
    if options:
        error = error + np.std(after, axis=1) ** 2
        before, after = before.mean(axis=1), after.mean(axis=1)
    error = np.sqrt(error / replicas)
    predicted, found = after - before, of_sgd.mean(axis=1) - before
    allowed = np.maximum(3.0 * error, 0.01 * np.abs(predicted).max())
    assert np.all(np.abs(found - predicted) < allowed), (predicted, found, error)
    return np.abs(predicted).max(), error.max()


QUICK = [
    ("label", ("scalar", 3), 0.9, 1.0),
    ("input", ("scalar", 2), 0.5, 1.0),
    ("minibatch", ("matrix", 2), 0.0, 0.9),
]
ALL = list(
    itertools.product(
        ("label", "input", "minibatch"),
        [("scalar", 2), ("scalar", 3), ("scalar", 4), ("matrix", 2), ("matrix", 3)],
        (0.0, 0.5, 0.9),
        (0.5, 1.0),
    )
)


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(("noise", "kind", "momentum", "h_lam"), QUICK)
def test_it_is_where_sgd_is(noise, kind, momentum, h_lam):
    layers = network(kind)
    problem, h = training_of(noise, layers, h_lam, momentum)
    moved, error = assert_agree(problem, gf.DeepLinear(layers), h, momentum, 200)
    assert moved > 20.0 * error
    assert moved > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "kind", "momentum", "h_lam"), ALL)
def test_it_is_where_sgd_is_for_every_noise(noise, kind, momentum, h_lam):
    layers = network(kind)
    problem, h = training_of(noise, layers, h_lam, momentum)
    moved, error = assert_agree(problem, gf.DeepLinear(layers), h, momentum, 400)
    assert moved > 20.0 * error


@pytest.mark.slow
def test_the_classical_limit_is_not():
    """The same comparison tells the finite step from h -> 0: it is no empty test."""
    layers = network(("scalar", 3))
    problem, h = training_of("label", layers, 1.0, 0.9)
    net = gf.DeepLinear(layers)
    ends = []
    for finite in (True, False):
        slow = gf.simulate(problem, net, SlowFlow(h, finite, 0.9), steps=STEPS, save=2)
        ends.append(np.diff([float(np.trace(g[-1])) for g in training.gram_path(slow.weights)])[0])
    assert abs(ends[0] - ends[1]) > 0.03 * abs(ends[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "regularizers",
    [
        [gf.WeightNoise(0.004)],
        [gf.Dropout(0.002, distribution="gaussian")],
        [gf.Dropout(0.002), gf.LabelNoise(0.03)],
        [gf.GradientNoise(0.01)],
        [gf.WeightDecay(2e-4), gf.LabelNoise(0.03)],
    ],
    ids=lambda r: "+".join(type(x).__name__ for x in r),
)
def test_noise_inside_the_network_and_on_the_gradient(regularizers):
    layers = network(("matrix", 2))
    data, x = samples(layers, 0.05)
    sxx = x.T @ x / ROWS
    lam = np.linalg.eigvalsh(reference.hessian(layers, sxx, reference.end_to_end(layers) @ sxx))[-1]
    problem = gf.Problem(data, regularizers)
    assert_agree(problem, gf.DeepLinear(layers), 0.6 / lam, 0.0, 400)
