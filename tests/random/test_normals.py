"""What may stand for normals: moments, pairs, weak orders, refusals; errors of antithetic means.

One scalar layer with target 0 and label noise obeys an Ornstein-Uhlenbeck equation, and its moments
under every solver a recursion of numbers; two layers are compared with a Gaussian run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiled import compiled

import gradflow as gf
from gradflow.random.streams import SIXTH, Stream

KEY = jax.random.key(11)
PAIRS = gf.Normals(antithetic=True)
STD = 0.5
SCALAR = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.LabelNoise(STD)])
TWO_LAYERS = gf.DeepLinear([[[1.5]], [[0.4]]])


def normals(kind: gf.Normals, steps: int = 100, paths: int = 200, channels: int = 3) -> np.ndarray:
    source = Stream(KEY, jnp.arange(steps), jnp.arange(paths), kind)
    return np.asarray(compiled(lambda s: s.normals((channels,)))(source))


def run(dynamics: Any, normals: gf.Normals | None = None, **options: Any) -> Any:
    chosen = {"problem": SCALAR, "net": TWO_LAYERS, "key": KEY, "progress": False} | options
    return gf.simulate(
        chosen.pop("problem"), chosen.pop("net"), dynamics, normals=normals, **chosen
    )


# Laws


@pytest.mark.parametrize(
    ("law", "ends", "values"),
    [
        ("two-point", [2**31, 2**32], [1.0, -1.0]),
        ("three-point", [SIXTH, 2**32 - SIXTH, 2**32], [np.sqrt(3.0), 0.0, -np.sqrt(3.0)]),
    ],
)
def test_laws_have_the_moments_of_their_order(
    law: Any, ends: list[int], values: list[float], monkeypatch: pytest.MonkeyPatch
):
    """Over all 2^32 words: intervals of them, whose ends and insides give the values stated."""
    firsts = [0, *ends[:-1]]
    inside = [(a + b) // 2 for a, b in zip(firsts, ends, strict=True)]
    words = np.array([firsts, inside, [e - 1 for e in ends]], np.uint32)
    monkeypatch.setattr(Stream, "_words", lambda *_: (jnp.asarray(words), jnp.asarray(words)))
    kind = gf.Normals(law=law)
    found = Stream(KEY, jnp.arange(3), jnp.arange(len(values)), kind).normals()
    np.testing.assert_array_equal(found, np.tile(values, (3, 1)))
    shares = np.diff([0, *ends]) / 2**32
    for power in range(1, 4 if law == "two-point" else 6):
        moment = scipy.stats.norm.moment(power)
        assert np.sum(shares * np.array(values) ** power) == pytest.approx(moment, rel=1e-9)


@pytest.mark.parametrize("law", ["two-point", "three-point"])
def test_draws_of_a_law_are_independent(law: Any):
    """Means and correlations of neighbours along every axis within four standard errors."""
    z = normals(gf.Normals(law=law))
    assert abs(z.mean()) < 4.0 / np.sqrt(z.size)
    for axis in range(3):
        a = np.take(z, range(z.shape[axis] - 1), axis).ravel()
        b = np.take(z, range(1, z.shape[axis]), axis).ravel()
        assert abs(np.mean(a * b)) < 4.0 / np.sqrt(a.size)
        assert abs(np.mean(a**2 * b**2) - 1.0) < 4.0 * np.sqrt(8.0 / a.size)


@pytest.mark.parametrize("precision", ["double", "single"])
def test_pairs_are_opposite_and_have_the_law_of_one(precision: Any):
    z = normals(gf.Normals(antithetic=True, precision=precision))
    np.testing.assert_array_equal(z[..., ::2], -z[..., 1::2])
    np.testing.assert_array_equal(z[..., ::2], normals(gf.Normals(precision=precision))[..., :100])
    for member in (z[..., ::2], z[..., 1::2]):
        assert scipy.stats.kstest(member.ravel(), "norm").pvalue > 0.01
    neighbours = z[..., :-2:2] * z[..., 2::2]
    assert abs(neighbours.mean()) < 4.0 / np.sqrt(neighbours.size)


def test_single_precision_changes_the_digits_only():
    z = normals(gf.Normals(precision="single"))
    assert z.dtype == np.float64
    assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 0.01


def test_what_is_not_normal_stays_independent_in_pairs():
    """Batches and labels of one problem: equal to those without pairs, and opposite."""
    x = np.arange(8.0)[:, None]
    data = gf.Regression.from_samples(x, 0.5 * x)
    problem = gf.Problem(data, [gf.Minibatch(2), gf.LabelNoise(STD)])

    def drawn(kind: gf.Normals) -> Any:
        return problem.draw(Stream(KEY, jnp.arange(5), jnp.arange(6), kind), (1, 1, 1))

    plain, paired = (compiled(drawn)(kind) for kind in (gf.Normals(), PAIRS))
    np.testing.assert_array_equal(paired[0], plain[0])
    assert not np.array_equal(paired[0][..., ::2], paired[0][..., 1::2])
    np.testing.assert_array_equal(paired[1][..., ::2], -paired[1][..., 1::2])


# Weak orders

LARGE = 0.5
"""A step size at which few steps show the fourth moment of an increment."""


def step_of(order: int, h: float, substeps: int) -> tuple[float, float]:
    """The linear map x -> A x + B z of a grid step for dx = -c x dt + sqrt(h) std dB."""
    dt = h / substeps
    amplitude = np.sqrt(h * dt) * STD
    if order == 1:
        return 1.0 - dt, amplitude
    c = (1.0 + 0.5 * h) * dt  # with the gradient of h/4 |grad L|^2
    return 1.0 - c + 0.5 * c**2, amplitude * (1.0 - 0.5 * c)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "order", "fourth"),
    [
        ("gaussian", 1, 3.0),
        ("two-point", 1, 1.0),
        ("three-point", 1, 3.0),
        ("gaussian", 2, 3.0),
        ("three-point", 2, 3.0),
    ],
)
def test_moments_of_one_layer_follow_their_recursion(law: Any, order: int, fourth: float):
    """E x^2 and E x^4 of three grid steps; a factor of 1.05 in the variance is far outside."""
    problem = gf.Problem(gf.Regression.whitened([[0.0]]), [gf.LabelNoise(STD)])
    dynamics = gf.StochasticFlow(LARGE, order=order, substeps=3)
    found = run(
        dynamics,
        gf.Normals(law=law),
        problem=problem,
        net=gf.DeepLinear([[[0.2]]]),
        steps=1,
        save=2,
        replicas=100_000,
        observables=[],
        store_weights=True,
    )
    x = found.weights[0][:, -1, 0, 0]
    a, b = step_of(order, LARGE, 3)
    m1, m2, m3, m4 = 0.2, 0.2**2, 0.2**3, 0.2**4
    for _ in range(3):
        m4 = a**4 * m4 + 6 * a**2 * b**2 * m2 + fourth * b**4
        m1, m2, m3 = a * m1, a**2 * m2 + b**2, a**3 * m3 + 3 * a * b**2 * m1
    for power, moment in ((1, m1), (2, m2), (3, m3), (4, m4)):
        error = np.std(x**power) / np.sqrt(x.size)
        assert abs(np.mean(x**power) - moment) < 4.0 * error, power
    assert 0.05 * m2 > 8.0 * np.std(x**2) / np.sqrt(x.size)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "order"), [("two-point", 1), ("three-point", 2)])
def test_two_layers_agree_weakly_with_a_gaussian_run(law: Any, order: int):
    r"""Means of the loss and of $u = w_1^2 - w_2^2$, which noise and the residual $m$ let decay.

    $$\frac{d}{dt} E \log u = -h\, \mathrm{std}^2 - \epsilon E m^2,$$

    $\epsilon = h$ at order 2 and the integration step of the Euler method at order 1. Both the
    excess loss $E m^2 / 2$ on the floor and the decay are proportional to the variance of an
    increment.
    """
    h, t1, substeps = 0.1, 5.0, 4
    dynamics = gf.StochasticFlow(h, order=order, substeps=substeps)
    options = {"t1": t1, "save": 51, "replicas": 20_000, "keep": "statistics"}
    options["observables"] = ["excess_loss", "imbalance"]
    plain = run(dynamics, **options)
    other = run(dynamics, gf.Normals(law=law), key=jax.random.key(5), **options)
    for name in ("excess_loss", "imbalance"):
        error = np.hypot(plain.standard_error(name), other.standard_error(name))[1:]
        difference = (plain.mean(name) - other.mean(name))[1:]
        assert np.all(np.abs(difference) < 4.5 * error), name
        if name == "excess_loss":  # a factor of 1.1 in the variance would be seen at the end
            assert 0.1 * plain.mean(name)[-1] > 4.5 * error[-1]
    squared = 2.0 * np.trapezoid(plain.mean("excess_loss"), plain.time)
    share = h if order == 2 else h / substeps
    lost = np.log(other.mean("imbalance")[-1] / other.mean("imbalance")[0])
    assert lost == pytest.approx(-h * STD**2 * t1 - share * squared, rel=0.02)


# Antithetic means

SEEDS, REPLICAS, FEW = 25, 320, 16


@pytest.fixture(scope="module")
def many_means() -> tuple[dict[str, Any], ...]:
    """Means over `FEW` replicas, and squared errors of such means: reported, and over replicas."""
    names = ["end_to_end", "excess_loss"]
    means, reported, naive = ({name: [] for name in names} for _ in range(3))
    for seed in range(SEEDS):
        options = {"steps": 40, "save": 2, "replicas": REPLICAS, "observables": names}
        key = jax.random.key(seed)
        paths = run(gf.GradientDescent(0.1), PAIRS, key=key, **options)
        found = run(gf.GradientDescent(0.1), PAIRS, key=key, keep="statistics", **options)
        for name in names:
            means[name].append(
                paths[name].reshape(REPLICAS, 2)[:, -1].reshape(-1, FEW).mean(axis=1)
            )
            error = found.standard_error(name).ravel()[-1]
            reported[name].append(error**2 * (REPLICAS / FEW))
            naive[name].append(found.variance(name).ravel()[-1] / FEW)
    return {n: np.concatenate(v) for n, v in means.items()}, reported, naive


@pytest.mark.slow
@pytest.mark.parametrize("name", ["end_to_end", "excess_loss"])
def test_the_standard_error_of_an_antithetic_mean_is_right(name: str, many_means: Any):
    """Against the spread of many small ensembles: chi-squared, so known to sqrt(2 / ensembles).

    An error over replicas would be wrong both for what is nearly odd in the noise, where it is much
    too large, and for what is nearly even, where it is too small.
    """
    means, reported, naive = (found[name] for found in many_means)
    spread = np.var(means, ddof=1)
    allowed = 4.0 * np.sqrt(2.0 / (means.size - 1))
    assert abs(np.mean(reported) / spread - 1.0) < allowed
    assert abs(np.mean(naive) / spread - 1.0) > allowed


@pytest.mark.slow
def test_pairs_make_the_mean_of_what_is_nearly_odd_more_accurate(many_means: Any):
    """E P: by a factor above 10 in variance, with the same expectation."""
    means, _, naive = (found["end_to_end"] for found in many_means)
    assert np.var(means, ddof=1) < 0.1 * np.mean(naive)
    plain = run(
        gf.GradientDescent(0.1),
        steps=40,
        save=2,
        replicas=20_000,
        observables=["end_to_end"],
        keep="statistics",
    )
    error = np.hypot(
        plain.standard_error("end_to_end").ravel()[-1], means.std() / np.sqrt(means.size)
    )
    assert abs(means.mean() - plain.mean("end_to_end").ravel()[-1]) < 4.0 * error


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3, 10, 101])
def test_chunks_hold_whole_pairs_and_change_nothing(chunk: int):
    options = {"steps": 30, "save": 3, "replicas": 60, "observables": ["excess_loss"]}
    dynamics = gf.GradientDescent(0.1)
    whole = run(dynamics, PAIRS, **options)["excess_loss"]
    parts = run(dynamics, PAIRS, keep="statistics", chunk=chunk, **options)
    assert int(parts.attrs["chunk"]) % 2 == 0
    np.testing.assert_allclose(parts.mean("excess_loss"), whole.mean(axis=0), rtol=1e-11)
    of_pairs = whole.reshape(30, 2, 3).mean(axis=1)
    expected = of_pairs.std(axis=0, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(parts.standard_error("excess_loss"), expected, rtol=1e-9, atol=1e-15)
    spread = whole.var(axis=0, ddof=1)
    np.testing.assert_allclose(parts.variance("excess_loss"), spread, rtol=1e-9, atol=1e-15)


@pytest.mark.slow
def test_a_pair_that_lost_a_replica_has_no_part_in_the_error():
    nets = [gf.DeepLinear([s * w for w in TWO_LAYERS.weights]) for s in (1, 1, 90, 1, 1.1, 1.1)]
    options = {"net": nets, "steps": 40, "save": 2, "observables": ["squared_norms"]}
    with pytest.warns(gf.DivergedWarning):
        paths = run(gf.GradientDescent(0.1), PAIRS, **options)
        found = run(gf.GradientDescent(0.1), PAIRS, keep="statistics", **options)
    assert paths.diverged.tolist() == [False, False, True, False, False, False]
    values = paths["squared_norms"][:, -1]
    alive = values[[0, 1, 3, 4, 5]]
    np.testing.assert_allclose(found.mean("squared_norms")[-1], alive.mean(axis=0), rtol=1e-12)
    of_pairs = np.stack([values[[0, 1]].mean(axis=0), values[[4, 5]].mean(axis=0)])
    expected = of_pairs.std(axis=0, ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(found.standard_error("squared_norms")[-1], expected, rtol=1e-9)


# Which runs take them

ROWS = gf.Regression.from_samples(np.arange(4.0)[:, None], np.ones((4, 1)))
BATCHES = gf.Problem(ROWS, [gf.Minibatch(2)])
MASKS = gf.Problem(SCALAR.data, [gf.DropConnect(0.1), gf.WeightDecay(0.1)])
TANGENT = gf.Problem(SCALAR.data, [gf.GradientNoise(0.1)])
SDE = gf.StochasticFlow(0.1)
TWO, THREE, SINGLE = (
    gf.Normals(law="two-point"), gf.Normals(law="three-point"), gf.Normals(precision="single")
)  # fmt: skip


@pytest.mark.parametrize(
    ("dynamics", "normals", "options", "message"),
    [
        (gf.GradientFlow(), PAIRS, {}, r"antithetic=True\): this GradientFlow draws no random"),
        (gf.GradientDescent(0.1), SINGLE, {"problem": BATCHES}, "no normals .*since Minibatch"),
        (gf.GradientDescent(0.1), PAIRS, {"problem": MASKS}, "no normals .*since DropConnect tak"),
        (gf.SlowFlow(0.1), SINGLE, {"problem": TANGENT}, "precision='single'.*Brownian bridge"),
        (gf.GradientDescent(0.1), TWO, {}, "law='two-point'.*noise of training itself"),
        (gf.SVAG(0.1), THREE, {}, "law='three-point'.*normals of SVAG are the noise"),
        (gf.StochasticFlow(0.1, diffusion="sampled"), TWO, {}, "law='two-point'.*sampled gradien"),
        (gf.StochasticFlow(0.1, order=2), TWO, {}, "order=2 needs .* use law='three-point'"),
        (gf.StochasticFlow(0.1, solver=diffrax.SPaRK()), THREE, {}, "solver=SPaRK is not known"),
        (gf.StochasticFlow(0.1, solver=diffrax.Heun()), TWO, {}, "solver=Heun is not known"),
        (SDE, PAIRS, {"replicas": 5}, r"replicas=5: .*antithetic=True\).* give an even number"),
        (SDE, PAIRS, {"replicas": None}, "replicas=None: .* give an even number"),
        (SDE, PAIRS, {"net": [TWO_LAYERS] * 3, "replicas": None}, "replicas=3: .* even"),
    ],
)
def test_refuses_what_cannot_serve(dynamics: Any, normals: Any, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        run(dynamics, normals, **({"t1": 1.0, "replicas": 4} | options))


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    ("dynamics", "normals", "options"),
    [
        (SDE, TWO, {}),
        (SDE, THREE, {}),
        (gf.StochasticFlow(0.1, order=2), THREE, {}),
        (gf.StochasticFlow(0.1, solver=diffrax.Euler()), TWO, {}),
        (gf.StochasticFlow(0.1, solver=diffrax.Heun()), PAIRS, {}),
        (gf.StochasticFlow(0.1, diffusion="sampled"), SINGLE, {}),
        (SDE, TWO, {"problem": BATCHES}),
        (gf.SVAG(0.1), PAIRS, {}),
        (gf.GradientFlow(), gf.Normals(), {"key": None}),
        (SDE, PAIRS, {"net": [TWO_LAYERS] * 4, "replicas": None}),
    ],
)
def test_takes_what_serves(dynamics: Any, normals: Any, options: dict):
    found = run(dynamics, normals, **({"t1": 0.2, "save": 2, "replicas": 4} | options))
    assert found.normals == normals
    assert not found.diverged.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "four-point"}, "Normals.law must be one of 'gaussian', .* got 'four-point'"),
        ({"precision": "half"}, "Normals.precision must be one of 'double', 'single'; got 'half'"),
        ({"law": "two-point", "precision": "single"}, "has no effect on the two-point law"),
    ],
)
def test_refuses_settings_that_make_no_sense(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gf.Normals(**options)


# Files

KEEPERS: list[Callable[..., Any]] = [
    lambda **o: run(gf.GradientDescent(0.1), gf.Normals(antithetic=True, precision="single"), **o),
    lambda **o: run(SDE, THREE, keep="statistics", **o),
]


@pytest.mark.slow
@pytest.mark.parametrize("make", KEEPERS, ids=["paths", "statistics"])
def test_a_file_knows_what_stood_for_normals(make: Callable[..., Any], tmp_path: Path):
    first = make(steps=20, save=3, replicas=10, observables=["loss"])
    loaded = type(first).load(first.save(tmp_path / "run.nc"))
    assert loaded.normals == first.normals != gf.Normals()
    again = gf.repeat(loaded)
    assert again.normals == first.normals
    for name, values in first.to_xarray().data_vars.items():
        np.testing.assert_array_equal(again.to_xarray()[name], values)


def test_files_from_before_hold_gaussian_normals():
    old = run(SDE, steps=2, save=2, replicas=2)
    assert json.loads(old.to_xarray().attrs.pop("normals")) == vars(gf.Normals())
    assert old.normals == gf.Normals()
