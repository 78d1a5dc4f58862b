"""The sampling of rows: equal chances, epochs, independence of blocks, and refusals."""

import itertools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.stats
from compiled import compiled

import gradflow as gf
from gradflow.random.streams import Stream
from gradflow.theory import noise_covariance

KEY = jax.random.key(11)


def rows(rule, n, steps, paths):
    """Row numbers (steps, batch, paths)."""
    data = gf.Regression.from_samples(np.arange(1.0, n + 1)[:, None], np.ones((n, 1)))
    stream = Stream(KEY, jnp.asarray(steps, jnp.uint32), jnp.arange(paths))
    return np.asarray(compiled(rule.draw)(stream, data))


def counts(drawn, ordered, n):
    """How often every batch was drawn; sorted unless `ordered`."""
    batch = drawn.shape[1]
    flat = np.moveaxis(drawn, 1, -1).reshape(-1, batch)
    flat = flat if ordered else np.sort(flat, axis=1)
    numbers = flat @ n ** np.arange(batch)
    return np.unique(numbers, return_counts=True)[1]


@pytest.mark.few_cases(3)
@pytest.mark.parametrize(("n", "batch"), [(5, 2), (4, 3), (6, 1), (3, 3)])
def test_all_subsets_are_equally_likely(n, batch):
    drawn = rows(gf.Minibatch(batch), n, range(64), 128)
    assert drawn.shape == (64, batch, 128)
    assert all(len(set(b)) == batch for b in np.moveaxis(drawn, 1, -1).reshape(-1, batch)[:500])
    seen = counts(drawn, ordered=False, n=n)
    assert len(seen) == len(list(itertools.combinations(range(n), batch)))
    if len(seen) > 1:
        assert scipy.stats.chisquare(seen).pvalue > 0.01


def test_with_replacement_all_tuples_are_equally_likely():
    drawn = rows(gf.Minibatch(2, replacement=True), 3, range(64), 128)
    seen = counts(drawn, ordered=True, n=3)
    assert len(seen) == 9
    assert scipy.stats.chisquare(seen).pvalue > 0.01


def test_with_replacement_a_batch_may_exceed_the_data():
    drawn = rows(gf.Minibatch(5, replacement=True), 2, range(4), 3)
    assert drawn.shape == (4, 5, 3)
    assert set(np.unique(drawn)) == {0, 1}


@pytest.mark.few_cases(4)
@pytest.mark.parametrize(("n", "batch"), [(6, 2), (6, 3), (7, 2), (5, 5), (4, 1)])
def test_an_epoch_visits_every_row_once(n, batch):
    per_epoch = n // batch
    drawn = rows(gf.Minibatch(batch, reshuffled=True), n, range(4 * per_epoch), 5)
    epochs = drawn.reshape(4, per_epoch * batch, 5)
    for epoch, path in itertools.product(range(4), range(5)):
        visited = epochs[epoch, :, path]
        assert len(set(visited)) == per_epoch * batch
        assert set(visited) <= set(range(n))
    if n > 2:
        orders = np.moveaxis(epochs, 1, -1).reshape(20, -1)
        assert len({tuple(order) for order in orders}) > 10


def test_every_order_of_an_epoch_is_equally_likely():
    drawn = rows(gf.Minibatch(1, reshuffled=True), 3, range(3 * 60), 50)
    orders = drawn.reshape(60, 3, 50)
    seen = counts(orders, ordered=True, n=3)
    assert len(seen) == 6
    assert scipy.stats.chisquare(seen).pvalue > 0.01


@pytest.mark.few_cases(1)
@pytest.mark.parametrize(
    "rule",
    [
        gf.Minibatch(2),
        gf.Minibatch(2, replacement=True),
        gf.Minibatch(2, reshuffled=True),
    ],
    ids=["without", "with", "epochs"],
)
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_rows_do_not_depend_on_how_steps_are_blocked(rule, start):
    """Blocks that start and end in the middle of an epoch of 3 steps, and span several."""
    whole = rows(rule, 7, range(16), 4)
    for length in (2, 7):
        block = rows(rule, 7, range(start, start + length), 4)
        assert np.array_equal(block, whole[start : start + length])


def test_online_batches_are_standard_normals():
    """On a population the batch is b rows of d_0 + d_N normals."""
    data = gf.Regression.whitened([[1.0, 2.0]], residual=0.3)
    stream = Stream(KEY, jnp.arange(50), jnp.arange(100))
    drawn = np.asarray(compiled(gf.Minibatch(4).draw)(stream, data))
    assert drawn.shape == (50, 4, 3, 100)
    assert scipy.stats.kstest(drawn.ravel(), "norm").pvalue > 0.01


@pytest.fixture
def without_type_checks():
    """As a user calls gradflow, whose own messages then speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("size", [0, -1, 2.0, "3", None, True])
def test_refused_batch_sizes(size):
    with pytest.raises(ValueError, match=r"Minibatch\.batch_size must be an integer >= 1; got"):
        gf.Minibatch(size)
    assert gf.Minibatch(np.int64(2)).batch_size == 2


def test_refused_flags():
    with pytest.raises(ValueError, match=r"Minibatch\.reshuffled.*set only one of the two"):
        gf.Minibatch(1, replacement=True, reshuffled=True)


def test_a_batch_cannot_exceed_the_rows():
    data = gf.Regression.from_samples([[1.0], [2.0]], [[1.0], [0.0]])
    message = "Minibatch.batch_size=3 exceeds the 2 rows of the data; choose at most that many or"
    for reshuffled in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)):
            gf.Problem(data, [gf.Minibatch(3, reshuffled=reshuffled)])


@pytest.mark.parametrize("flag", ["replacement", "reshuffled"])
def test_populations_have_no_rows_to_choose(flag):
    message = f"Minibatch.{flag}=True needs a finite sample"
    with pytest.raises(ValueError, match=re.escape(message)):
        gf.Problem(gf.Regression.whitened([[1.0]]), [gf.Minibatch(2, **{flag: True})])


def test_epochs_have_no_white_noise():
    data = gf.Regression.from_samples([[1.0], [2.0]], [[1.0], [0.0]])
    problem = gf.Problem(data, [gf.Minibatch(1, reshuffled=True)])
    normals = jax.tree.map(lambda s: jnp.zeros(s.shape), problem.normal_shapes((1, 1)))
    with pytest.raises(ValueError, match=r"Minibatch\.reshuffled=True correlates the steps"):
        problem.noise((jnp.ones((1, 1)),), normals)
    with pytest.raises(ValueError, match=r"Minibatch\.reshuffled=True correlates the steps"):
        noise_covariance(problem, (jnp.ones((1, 1)),))
