"""optax by name: the same runs as with the functions themselves."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.random.streams import Stream

PROBLEM = gf.Problem(gf.Regression.whitened([[1.0]]))
NET = gf.DeepLinear([[[2.0]], [[0.1]]])


def losses(dynamics):
    return gf.simulate(PROBLEM, NET, dynamics, steps=40, save=5)["loss"]


def test_an_optimizer_by_name():
    by_name = gf.GradientDescent(0.05, optimizer=gf.FromOptax("adam", b1=0.8))
    by_function = gf.GradientDescent(0.05, optimizer=functools.partial(optax.adam, b1=0.8))
    assert (losses(by_name) == losses(by_function)).all()
    assert not (losses(by_name) == losses(gf.GradientDescent(0.05))).all()


def test_a_schedule_by_name():
    options = {"init_value": 0.1, "transition_steps": 10, "decay_rate": 0.5}
    by_name = gf.GradientDescent(gf.FromOptax("exponential_decay", **options))
    by_function = gf.GradientDescent(optax.exponential_decay(**options))
    assert (losses(by_name) == losses(by_function)).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamm", {}, "optax has no function 'adamm'"),
        ("GradientTransformation", {}, "optax has no function"),
        ("adam", {"beta": 0.9}, "does not take these options: .*'beta'"),
        ("exponential_decay", {"init_value": 0.1}, "does not take these options: missing"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        gf.FromOptax(name, **options)


def test_a_wrong_option_is_answered_with_the_names_of_the_others():
    with pytest.raises(ValueError) as caught:
        gf.FromOptax("adam", beta=0.9)
    text = str(caught.value)
    assert "; it has b1, b2, eps, " in text and "learning_rate" not in text and len(text) < 200


# Everything that optax has: it runs, or one sentence of gradflow says why it does not


def arguments(function):
    """A number for every argument that has no default; a learning rate comes from the dynamics."""
    return {
        name: 1.0
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name != "learning_rate"
    }


NAMES = [
    name
    for name in dir(optax)
    if not name.startswith("_")
    and callable(getattr(optax, name))
    and not inspect.isclass(getattr(optax, name))
    and getattr(optax, name).__module__.startswith("optax")
]
OPTIMIZERS = {name for name in NAMES if getattr(optax, name).__module__ == "optax._src.alias"}
OPTIMIZERS -= {"noisy_sgd"}  # noise of its own, the same for every replica
OPTIMIZERS |= {"scale_by_learning_rate"}


@pytest.mark.few_cases(11)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_optax_is_an_optimizer_a_schedule_or_refused(name):
    try:
        found = gf.FromOptax(name, **arguments(getattr(optax, name)))
    except ValueError as error:
        assert name not in OPTIMIZERS
        assert not name.endswith("_schedule") or name in NOT_OF_ONES
        text = str(error)
        assert text.startswith("FromOptax") and name in text and "\n" not in text
        return
    assert found.is_optimizer == (name in OPTIMIZERS)
    assert found.is_optimizer or name.endswith(("_schedule", "_decay"))


NOT_OF_ONES = {
    # They take text, functions, lists, or two lengths that differ.
    "piecewise_interpolate_schedule",
    "scale_by_schedule",
    "sgdr_schedule",
    "warmup_cosine_decay_schedule",
}


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("adafactor", "sm3") else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(OPTIMIZERS)
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_optimizer_of_optax_lowers_the_loss(name):
    dynamics = gf.GradientDescent(0.01, optimizer=gf.FromOptax(name))
    run = gf.simulate(PROBLEM, gf.DeepLinear([[[0.8]], [[0.6]]]), dynamics, steps=5, save=2)
    assert run["loss"][-1] < run["loss"][0] == pytest.approx(0.5 * 0.52**2)


def test_polyak_steps_by_hand():
    """Steps of (L - L*) / |g|^2 along the gradient, at most 1 (Loizou et al. 2021)."""
    dynamics = gf.GradientDescent(0.1, optimizer=gf.FromOptax("polyak_sgd"))
    run = gf.simulate(PROBLEM, NET, dynamics, steps=4, save=5)
    w = np.array([2.0, 0.1])
    for k in range(5):
        np.testing.assert_allclose([v[k, 0, 0] for v in run.weights], w, rtol=1e-13)
        residual = w[0] * w[1] - 1.0
        g = residual * w[::-1]
        w = w - min(0.5 * residual**2 / (g @ g), 1.0) * g


@pytest.mark.parametrize(
    "regularizers",
    [
        [gf.WeightDecay(0.1)],
        [gf.Minibatch(2, replacement=True)],
        [gf.LabelNoise(0.1), gf.GradientNoise(0.1)],
        [gf.InputNoise(0.1), gf.WeightNoise(0.1), gf.WeightDecay(0.1)],
        [gf.Dropout(0.2), gf.Minibatch(2)],
    ],
    ids=lambda r: "+".join(type(x).__name__ for x in r),
)
def test_the_loss_of_a_step_has_the_gradient_of_the_step(regularizers):
    x = np.random.default_rng(3).normal(size=(4, 2))
    problem = gf.Problem(gf.Regression.from_samples(x, x @ [[1.0], [0.5]]), regularizers)
    net = gf.init.gaussian((2, 3, 1), key=jax.random.key(5))
    stream = Stream(jnp.zeros((2,), jnp.uint32), jnp.arange(1), jnp.arange(1))
    draw = jax.tree.map(lambda leaf: leaf[0, ..., 0], problem.draw(stream, net.widths))
    found = jax.jit(lambda w: problem.sampled_gradient(w, draw))(net.weights)
    loss = jax.jit(lambda *weights: problem.sampled_loss(weights, draw))
    eps = 1e-6
    for i, layer in enumerate(net.weights):
        for entry in np.ndindex(layer.shape):
            below, above = [
                loss(*(w.at[entry].add(s) if j == i else w for j, w in enumerate(net.weights)))
                for s in (-eps, eps)
            ]
            slope = (above - below) / (2 * eps)
            np.testing.assert_allclose(found[i][entry], slope, rtol=1e-6, atol=1e-8)


def test_the_loss_of_a_batch_by_hand():
    x, y = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [3.0], [2.0]])
    problem = gf.Problem(gf.Regression.from_samples(x, y), [gf.Minibatch(2), gf.WeightDecay(0.5)])
    loss = float(problem.sampled_loss(NET.weights, (jnp.array([0, 2]), None)))
    by_hand = 0.5 * np.mean((0.2 * x[[0, 2]] - y[[0, 2]]) ** 2)
    assert loss == pytest.approx(by_hand + 0.25 * (4.0 + 0.01), rel=1e-14)
    assert problem.sampled_loss(NET.weights, (jnp.array([0, 2]), None), False) == pytest.approx(
        by_hand, rel=1e-14
    )


LBFGS = gf.GradientDescent(1.0, optimizer=gf.FromOptax("lbfgs"))
SAMPLE = gf.Regression.from_samples(np.linspace(0.5, 2.0, 4)[:, None], np.linspace(0.5, 2.0, 4))


@pytest.mark.slow
def test_lbfgs_converges_and_needs_a_loss():
    assert gf.simulate(PROBLEM, NET, LBFGS, steps=30, save=2)["loss"][-1] < 1e-20
    population = gf.Problem(gf.Regression.whitened([[1.0]]), [gf.InputNoise(0.1)])
    with pytest.raises(ValueError, match=r"GradientDescent.optimizer: .* population .* InputNoise"):
        gf.simulate(population, NET, LBFGS, steps=3, key=jax.random.key(0))


@pytest.mark.slow
def test_lbfgs_converges_on_batches_that_have_one_minimum():
    problem = gf.Problem(SAMPLE, [gf.Minibatch(2, replacement=True)])
    options = {"replicas": 2, "key": jax.random.key(0)}
    run = gf.simulate(problem, NET, LBFGS, steps=30, save=2, **options)
    assert np.all(run["loss"][:, -1] < 1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip_by_global_norm", {"max_norm": 1.0}, "part of an optimizer and not one.*chain"),
        ("add_decayed_weights", {"weight_decay": 0.1}, "part of an optimizer and not one"),
        ("scale_by_rprop", {}, "part of an optimizer and not one"),
        ("noisy_sgd", {"key": 0}, "optax.noisy_sgd draws noise of its own, the same for every"),
        ("l2_loss", {"predictions": 1.0}, "neither an optimizer nor a schedule"),
        ("matrix_inverse_pth_root", {"matrix": 1.0, "p": 2}, "cannot be made of these options"),
        ("Params", {}, "optax has no function 'Params'"),
        (
            "piecewise_constant_schedule",
            {"init_value": 0.1, "boundaries_and_scales": {3: 0.1}},
            "boundaries_and_scales must be a number or text; got dict",
        ),
        ("adam", {"b1": jnp.asarray(0.9)}, "b1 must be a number or text; got ArrayImpl"),
    ],
)
def test_what_is_not_an_optimizer_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        gf.FromOptax(name, **options)


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (
            functools.partial(optax.noisy_sgd, key=0),
            ValueError,
            "GradientDescent.optimizer: it draws noise of its own",
        ),
        (optax.clip_by_global_norm(1.0), ValueError, "moves the weights up the gradient"),
        (optax.clip_by_global_norm, ValueError, "clip_by_global_norm moves the weights up"),
        (optax.scale(0.1), ValueError, "optimizer: GradientTransform.* up the gradient"),
        (
            optax.lookahead(optax.sgd(0.1), 2, 0.5),
            TypeError,
            "GradientDescent.optimizer: the optax transformation cannot be used",
        ),
        (
            optax.masked(optax.sgd(0.1), (True, False, True)),
            TypeError,
            "GradientDescent.optimizer: the optax transformation cannot be used",
        ),
        (
            optax.GradientTransformation(lambda w: 0, lambda g, s, w: (g, (s, s))),
            TypeError,
            "GradientDescent.optimizer: its state differs in structure, shape or type",
        ),
        (
            optax.GradientTransformation(lambda w: 0, lambda g, s, w: (g[:1], s)),
            TypeError,
            "GradientDescent.optimizer: its update differs in structure",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`params` has no attribute")
def test_transformations_that_cannot_be_used(optimizer, error, message):
    with pytest.raises(error, match=message):
        gf.simulate(PROBLEM, NET, gf.GradientDescent(0.1, optimizer=optimizer), steps=2, save=2)


@pytest.mark.slow
def test_a_chain_with_a_learning_rate_and_a_descent_without_one_run():
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        gf.FromOptax("scale", step_size=-0.1),
        optax.polyak_sgd(),
        optax.set_to_zero(),
    ):
        run = gf.simulate(
            PROBLEM, NET, gf.GradientDescent(0.1, optimizer=optimizer), steps=2, save=2
        )
        assert np.isfinite(run["loss"]).all()
    assert (run["loss"] == run["loss"][0]).all()
