"""Regression data: moments against NumPy, SciPy and scikit-learn, and every refusal."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import sklearn.datasets
from hypothesis import given, strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import StandardScaler

import gradflow as gf
from gradflow.data import Regression

DERIVED = ("sxx_eigenvalues", "sxx_eigenvectors", "residual_sqrt", "best_map")


def samples(seed: int, n: int, d_in: int, d_out: int, noise: float = 0.3):
    """Inputs of unequal spread and non-zero mean, targets with noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d_in)) @ rng.normal(size=(d_in, d_in)) + rng.normal(size=d_in)
    y = x @ rng.normal(size=(d_in, d_out)) + noise * rng.normal(size=(n, d_out)) + 1.0
    return x, y


def close(actual, expected, tolerance=1e-12):
    scale = max(1.0, float(np.abs(np.asarray(expected)).max()))
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * scale)


seeds = st.integers(0, 2**32 - 1)
widths = st.integers(1, 5)


# Populations


def test_whitened_population():
    target = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    data = Regression.whitened(target, n=4)
    assert np.array_equal(data.sxx, np.eye(3))
    assert np.array_equal(data.syx, target)
    assert np.array_equal(data.best_map, target)
    assert np.array_equal(data.target, target)
    assert np.array_equal(data.residual_sqrt, np.zeros((2, 2)))
    assert np.array_equal(data.sxx_eigenvalues, np.ones(3))
    close(data.syy, [[5.25, -5.5], [-5.5, 10.0]])
    assert (data.d_in, data.d_out, float(data.n)) == (3, 2, 4.0)
    assert data.is_population and data.x is None and data.y is None
    assert float(data.irreducible_loss) == 0.0
    assert data.input_names == ("x1", "x2", "x3") and data.target_names == ("y1", "y2")
    assert data.name == "whitened"


def test_a_number_is_a_scalar_target():
    assert np.array_equal(Regression.whitened(2.0).syx, [[2.0]])
    assert np.array_equal(Regression.whitened([[2]]).syx, [[2.0]])


def test_whitened_residual():
    covariance = np.array([[2.0, 0.5], [0.5, 1.0]])
    data = Regression.whitened([[1.0], [3.0]], residual=covariance)
    close(data.syy, np.array([[1.0, 3.0], [3.0, 9.0]]) + covariance)
    close(data.residual_sqrt, scipy.linalg.sqrtm(covariance))
    close(data.irreducible_loss, 1.5)
    same = Regression.whitened([[1.0], [3.0]], residual=0.25)
    close(same.residual_sqrt, 0.5 * np.eye(2))
    close(same.irreducible_loss, 0.25)


@given(seeds, widths, widths)
def test_moments_with_noise(seed, d_in, d_out):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d_in + d_out, d_in + d_out + 2))
    joint = root @ root.T
    sxx, syx, syy = joint[:d_in, :d_in], joint[d_in:, :d_in], joint[d_in:, d_in:]
    data = Regression.from_moments(sxx, syx, syy)
    target = np.linalg.solve(sxx, syx.T).T
    condition = np.linalg.cond(sxx)
    close(data.target, target, 1e-13 * condition)
    residual = syy - syx @ np.linalg.solve(sxx, syx.T)
    close(data.residual_sqrt @ data.residual_sqrt, residual, 1e-11 * condition)
    close(data.residual_sqrt, data.residual_sqrt.T)
    close(data.irreducible_loss, np.trace(residual) / 2, 1e-11 * condition)
    values, vectors = np.asarray(data.sxx_eigenvalues), np.asarray(data.sxx_eigenvectors)
    assert np.all(np.diff(values) >= 0)
    close(vectors * values @ vectors.T, sxx)
    close(vectors.T @ vectors, np.eye(d_in))


@given(seeds, widths, widths, st.integers(1, 5))
def test_moments_without_noise_of_any_rank(seed, d_in, d_out, rank):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d_in, min(rank, d_in)))
    sxx = root @ root.T
    syx = rng.normal(size=(d_out, d_in)) @ sxx
    data = Regression.from_moments(sxx, syx, n=2)
    expected = syx @ np.linalg.pinv(sxx, rcond=1e-12, hermitian=True)
    tolerance = 1e-13 * np.linalg.cond(root) ** 2
    close(data.best_map, expected, tolerance)
    close(data.syy, expected @ syx.T, tolerance)
    assert int(np.sum(np.asarray(data.sxx_eigenvalues) > 0)) == min(rank, d_in)
    assert np.all(np.asarray(data.sxx_eigenvalues) >= 0)
    assert float(data.irreducible_loss) == 0.0
    if rank < d_in:
        with pytest.raises(ValueError, match=f"rank {rank} of {d_in}.*best_map"):
            _ = data.target


def test_single_precision_moments_are_accepted():
    x, y = samples(0, 50, 4, 2)
    sxx, syx, syy = ((m / 50).astype(np.float32) for m in (x.T @ x, y.T @ x, y.T @ y))
    sxx[0, 1] = np.nextafter(sxx[0, 1], np.float32(np.inf))
    data = Regression.from_moments(sxx, syx, syy)
    assert data.sxx.dtype == jnp.float64
    close(data.best_map, np.linalg.solve(sxx.astype(float), syx.T.astype(float)).T, 1e-4)


def test_nearly_collinear_inputs_keep_an_accurate_floor():
    x, y = samples(3, 200, 3, 1)
    x[:, 2] = x[:, 0] + 1e-5 * x[:, 1] ** 2
    residual = y - x @ np.linalg.lstsq(x, y)[0]
    close(Regression.from_samples(x, y).irreducible_loss, np.mean(residual**2) / 2, 1e-10)


# Samples


@given(seeds, st.integers(1, 12), widths, widths)
def test_samples_against_least_squares(seed, n, d_in, d_out):
    x, y = samples(seed, n, d_in, d_out)
    data = Regression.from_samples(x, y)
    close(data.sxx, np.einsum("ki,kj->ij", x, x) / n)
    close(data.syx, np.einsum("ki,kj->ij", y, x) / n)
    close(data.syy, np.einsum("ki,kj->ij", y, y) / n)
    solution = np.linalg.lstsq(x, y, rcond=1e-7)[0]
    singular = np.linalg.svd(x, compute_uv=False)
    condition = (singular[0] / singular[singular > 1e-7 * singular[0]][-1]) ** 2
    close(data.best_map, solution.T, 1e-12 * condition)
    least = np.sum((y - x @ solution) ** 2) / (2 * n)
    assert abs(float(data.irreducible_loss) - least) <= 1e-11 * condition * np.mean(y**2)
    assert float(data.n) == n and not data.is_population
    assert np.array_equal(data.x, x) and np.array_equal(data.y, y)


@given(seeds, st.sampled_from(["inputs", "targets", "both", True, False]))
def test_standardized_like_scikit_learn(seed, standardize):
    x, y = samples(seed, 30, 3, 2)
    data = Regression.from_samples(x, y, standardize=standardize)
    inputs, targets = standardize in ("inputs", "both", True), standardize in ("targets", "both", 1)
    close(data.x, StandardScaler().fit_transform(x) if inputs else x)
    close(data.y, StandardScaler().fit_transform(y) if targets else y)


@pytest.mark.parametrize("standardize", [False, "both"])
def test_whitened_samples(standardize):
    x, y = samples(5, 40, 4, 2)
    data = Regression.from_samples(x, y, standardize=standardize, whiten=True)
    plain = Regression.from_samples(x, y, standardize=standardize)
    assert np.array_equal(data.sxx, np.eye(4))
    sample = np.asarray(data.x)
    close(sample.T @ sample / 40, np.eye(4), 1e-14)
    root = scipy.linalg.fractional_matrix_power(np.asarray(plain.sxx), -0.5)
    close(sample, np.asarray(plain.x) @ root, 1e-11)
    close(data.irreducible_loss, plain.irreducible_loss, 1e-12)


def test_standardizing_huge_and_tiny_columns():
    x, y = samples(6, 20, 3, 1)
    scaled = Regression.from_samples(x * [1e200, 1e-200, 1.0], y, standardize=True)
    close(scaled.x, StandardScaler().fit_transform(x))
    with pytest.raises(ValueError, match=r'data\.x: entries as large as .*e\+200 .*"inputs"'):
        Regression.from_samples(x * 1e200, y)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.tolist(),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int8),
        lambda a: np.asfortranarray(a),
        lambda a: jnp.asarray(a),
        lambda a: pd.DataFrame(a),
        lambda a: pd.DataFrame(a).astype("Int64"),
        lambda a: pd.DataFrame(a).astype("float32"),
    ],
)
def test_kinds_of_input(convert):
    x = np.array([[1.0, 0.0], [2.0, -3.0], [0.0, 1.0]])
    data = Regression.from_samples(convert(x), convert(x[:, :1]))
    assert data.x.dtype == data.sxx.dtype == jnp.float64
    assert np.array_equal(data.x, x) and np.array_equal(data.y, x[:, :1])


def test_booleans_and_vectors_of_targets():
    x = np.array([[1.0], [2.0], [4.0]])
    for y in (np.array([True, False, True]), [1, 0, 1], jnp.array([1, 0, 1]), pd.Series([1, 0, 1])):
        assert np.array_equal(Regression.from_samples(x, y).y, [[1.0], [0.0], [1.0]])


def test_frames_bring_their_names():
    frame = pd.DataFrame({"age": [1.0, 2.0], "bmi": [3.0, 5.0], "risk": [1, 2]})
    data = Regression.from_samples(frame[["age", "bmi"]], frame["risk"], name="toy")
    assert data.input_names == ("age", "bmi") and data.target_names == ("risk",)
    assert data.name == "toy"
    renamed = Regression.from_samples(
        frame[["age", "bmi"]], frame["risk"], input_names=["a", "b"], target_names="r"
    )
    assert renamed.input_names == ("a", "b") and renamed.target_names == ("r",)


def test_constant_inputs_are_dropped_with_their_names():
    x = np.array([[0.1, 1.0, 7.0], [0.1, 2.0, 7.0], [0.1, 4.0, 7.0]])
    y = [1.0, 0.0, 2.0]
    data = Regression.from_samples(x, y, standardize=True, drop_constant=True)
    assert data.input_names == ("x2",) and data.d_in == 1
    with pytest.raises(ValueError, match="every column is constant"):
        Regression.from_samples(x[:, [0, 2]], y, drop_constant=True)


def test_the_callers_array_is_not_shared():
    x, y = samples(7, 10, 2, 1)
    data = Regression.from_samples(x, y)
    kept = x.copy()
    x[:] = 0
    assert np.array_equal(data.x, kept)


# Saving


@given(seeds, st.integers(1, 9), widths, widths, st.booleans())
def test_round_trip_is_exact(seed, n, d_in, d_out, population):
    x, y = samples(seed, n, d_in, d_out)
    if population:
        data = Regression.from_moments(x.T @ x / n, y.T @ x / n, y.T @ y / n, n=2.5, name="m")
    else:
        data = Regression.from_samples(x, y, name="s")
    arrays = data.to_arrays()
    assert set(arrays) == {"sxx", "syx", "syy", "n"} | (set() if population else {"x", "y"})
    assert all(type(array) is np.ndarray for array in arrays.values())
    copies = {name: np.array(array, order="F") for name, array in arrays.items()}
    again = Regression.from_arrays(copies, json.loads(json.dumps(data.attrs())))
    assert jax.tree.structure(again) == jax.tree.structure(data)
    for field in ("sxx", "syx", "syy", "n", "x", "y", *DERIVED):
        before, after = getattr(data, field), getattr(again, field)
        assert (before is None) == (after is None)
        assert before is None or np.asarray(before).tobytes() == np.asarray(after).tobytes(), field


def test_round_trip_in_single_precision():
    x, y = samples(8, 20, 3, 2, noise=0.0)
    with jax.enable_x64(False):
        data = Regression.from_samples(x, y - 1.0)
        again = Regression.from_arrays(data.to_arrays(), data.attrs())
        assert data.sxx.dtype == jnp.float32
        for field in ("sxx", "n", "x", *DERIVED):
            assert np.array_equal(getattr(data, field), getattr(again, field)), field
        assert float(data.irreducible_loss) < 1e-4 * float(jnp.trace(data.syy))


def test_attributes_as_netcdf_returns_them():
    data = Regression.whitened([[1.0]], input_names=["age"], target_names=["risk"])
    labels = {"name": "w", "input_names": "age", "target_names": np.array(["risk"], object)}
    again = Regression.from_arrays(data.to_arrays(), labels)
    assert (again.name, again.input_names, again.target_names) == ("w", ("age",), ("risk",))
    assert Regression.from_arrays(data.to_arrays()).input_names == ("x1",)


# Inside JAX


def test_target_inside_jit():
    regular = Regression.whitened([[1.0, 2.0]])
    singular = Regression.from_moments(np.diag([1.0, 0.0]), [[1.0, 0.0]])
    target = eqx.filter_jit(lambda data: data.target)
    close(target(regular), [[1.0, 2.0]])
    with pytest.raises(RuntimeError, match="sxx is singular"):
        target(singular).block_until_ready()


def test_new_values_do_not_retrace():
    traces = []

    @eqx.filter_jit
    def loss_floor(data):
        traces.append(None)
        return data.irreducible_loss * data.n

    for n in (1, 2, 3):
        close(loss_floor(Regression.whitened([[float(n)]], n=n, residual=2.0)), n)
    assert len(traces) == 1


# Files


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(11)
    return pd.DataFrame(rng.normal(size=(25, 4)), columns=["age", "bmi", "dose", "risk"])


def write(frame: pd.DataFrame, path) -> str:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        np.savez(path, frame.to_numpy())
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".parquet", ".npz"])
def test_files_hold_the_same_numbers(frame, tmp_path, suffix):
    path = tmp_path / f"trial{suffix}"
    write(frame, path.with_suffix(suffix.lower()))
    path.with_suffix(suffix.lower()).rename(path)
    data = Regression.from_file(path, inputs=[2, 0], targets=[-1], standardize=False)
    assert np.array_equal(data.x, frame[["dose", "age"]])
    assert np.array_equal(data.y, frame[["risk"]])
    assert data.name == "trial"
    names = ("column_2", "column_0") if suffix == ".npz" else ("dose", "age")
    assert data.input_names == names


def test_columns_by_name_and_the_rest_as_inputs(frame, tmp_path):
    path = write(frame, tmp_path / "trial.csv")
    data = Regression.from_file(path, targets=["risk", "bmi"])
    assert data.input_names == ("age", "dose") and data.target_names == ("risk", "bmi")
    close(data.x, StandardScaler().fit_transform(frame[["age", "dose"]]))
    close(data.y, StandardScaler().fit_transform(frame[["risk", "bmi"]]))
    white = Regression.from_file(path, inputs=["age", "dose"], targets="risk", whiten=True)
    assert np.array_equal(white.sxx, np.eye(2))


def test_separator_and_missing_header(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("1; 2; 3\n4; 6; 5\n")
    data = Regression.from_file(path, targets=2, separator=";", header=False, standardize=False)
    assert np.array_equal(data.x, [[1, 2], [4, 6]]) and np.array_equal(data.y, [[3], [5]])
    assert data.target_names == ("column_2",)
    with pytest.raises(ValueError, match=r"first line of 'plain\.csv' holds numbers.*header=False"):
        Regression.from_file(path, targets=2, separator=";")
    path.write_text("a;b\n1;2\n")
    with pytest.raises(ValueError, match="no column 'b'; the columns are 'a;b'"):
        Regression.from_file(path, targets="b")
    with pytest.raises(ValueError, match="one column only: is the separator right"):
        Regression.from_file(path, targets=0)


def test_npz_arrays_by_name(tmp_path):
    x, y = samples(12, 10, 2, 1)
    np.savez(tmp_path / "a.npz", x=x, y=y[:, 0])
    data = Regression.from_file(tmp_path / "a.npz", standardize=False)
    assert np.array_equal(data.x, x) and np.array_equal(data.y, y)
    assert data.input_names == ("x1", "x2") and data.target_names == ("y1",)
    np.savez(tmp_path / "b.npz", features=x, response=y, other=y)
    data = Regression.from_file(tmp_path / "b.npz", "features", "response", standardize=False)
    assert data.input_names == ("features1", "features2")
    with pytest.raises(ValueError, match=r"data\.inputs: no column 'x'.*'features', 'response'"):
        Regression.from_file(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"data\.targets: choose one array"):
        Regression.from_file(tmp_path / "b.npz", "features", ["response", "other"])
    np.savez(tmp_path / "c.npz", x=x, y=y[:5])
    with pytest.raises(ValueError, match=r"data\.y: has 5 rows but x has 10"):
        Regression.from_file(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=x[:, 0])
    with pytest.raises(ValueError, match=r"holds one array of shape \(10,\)"):
        Regression.from_file(tmp_path / "d.npz", targets=0)
    np.savez(tmp_path / "e.npz", x=np.array(["a", None], object), y=y)
    with pytest.raises(ValueError, match=r"e\.npz' is not a readable \.npz file"):
        Regression.from_file(tmp_path / "e.npz")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", r"data\.path: 'a\.csv' is empty"),
        ("a.csv", "u,v\n", r"data\.path: 'a\.csv' has no rows"),
        ("a.csv", "u,v\n1,x\n2,z\n", r"data\.y: column 'v' is not numeric \(.*'x'\)"),
        ("a.csv", "u,v\n1,2\n,3\n5,6\n", r"data\.x: 1 entries .* nan in row 1 .*'u'"),
        ("a.csv", "u,v\n1,2\n5,inf\n", r"data\.y: 1 entries .* inf in row 1 .*'v'"),
        ("a.csv", "u,v\n1,2\n1,3\n", r"data\.x: cannot standardise constant columns 'u'.* 1\.0 in"),
        ("a.csv", "u,v\n1,2\n3,2\n", r"data\.y: cannot standardise constant columns 'v'"),
        ("a.csv", "u,v\n1,2,3\n", "not a table separated by ','"),
        ("a.csv", "u,v\n1,2\n1,2,3\n", "not a table separated by ','"),
        ("a.txt", "u,v\n", r"extension '\.txt'; gradflow reads \.csv, \.parquet and \.npz"),
        ("a.parquet", "u,v\n", r"a\.parquet' is not a readable Parquet file"),
        ("a.npz", "u,v\n", r"a\.npz' is not a readable \.npz file"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Regression.from_file(tmp_path / name, targets="v")


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (None, None, r"data\.targets: choose .* from 'age', 'bmi', 'dose', 'risk'"),
        (None, "fat", r"data\.targets: no column 'fat'; the columns are 'age', 'bmi', 'dose'"),
        (["age", 9], "risk", r"data\.inputs: no column 9; the 4 columns are"),
        (["age", "risk"], "risk", r"data\.inputs: 'risk' are inputs and targets at once"),
        (["age", 0], "risk", r"data\.inputs: column 'age' is chosen twice"),
        ([], "risk", r"data\.inputs: no column is chosen"),
        (None, [0, 1, 2, 3], r"data\.inputs: no column is left"),
    ],
)
def test_bad_columns(frame, tmp_path, inputs, targets, message):
    path = write(frame, tmp_path / "trial.csv")
    with pytest.raises(ValueError, match=message):
        Regression.from_file(path, inputs, targets)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path: there is no file '.*none\.csv'"):
        Regression.from_file(tmp_path / "none.csv", targets="y")


def test_many_columns_are_not_all_listed(tmp_path):
    pd.DataFrame(np.ones((2, 60))).add_prefix("c").to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ValueError, match="'c39' and 20 more"):
        Regression.from_file(tmp_path / "a.csv", targets="y")


# Tables inside scikit-learn


@pytest.mark.parametrize(
    ("name", "rows", "d_in", "d_out"),
    [
        ("diabetes", 442, 10, 1),
        ("linnerud", 20, 3, 3),
        ("iris", 150, 4, 3),
        ("wine", 178, 13, 3),
        ("breast_cancer", 569, 30, 2),
        ("digits", 1797, 61, 10),
    ],
)
def test_bundled_tables(name, rows, d_in, d_out):
    data = Regression.from_sklearn(name)
    assert data.x.shape == (rows, d_in) and data.y.shape == (rows, d_out)
    assert data.name == name and len(set(data.input_names)) == d_in
    close(np.diag(data.sxx), np.ones(d_in))
    close(np.diag(data.syy), np.ones(d_out))
    raw = getattr(sklearn.datasets, f"load_{name}")()
    raw_x = StandardScaler().fit_transform(raw.data[:, raw.data.std(axis=0) > 0])
    raw_y = raw.target[:, None] if raw.target.ndim == 1 else raw.target
    if name not in ("diabetes", "linnerud"):
        raw_y = np.eye(d_out)[raw.target]
    close(data.y, StandardScaler().fit_transform(raw_y))
    close(data.x, raw_x)
    model = LinearRegression().fit(raw_x, np.asarray(data.y))
    unexplained = np.mean((np.asarray(data.y) - model.predict(raw_x)) ** 2, axis=0)
    close(data.irreducible_loss, unexplained.sum() / 2, 1e-10)


def test_bundled_targets_and_names():
    data = Regression.from_sklearn("linnerud", targets=["Pulse", 0])
    assert data.target_names == ("Pulse", "Weight")
    assert data.input_names == ("Chins", "Situps", "Jumps")
    classes = Regression.from_sklearn("iris", targets="virginica", standardize="inputs")
    assert np.array_equal(np.unique(classes.y, return_counts=True), [[0.0, 1.0], [100, 50]])
    assert Regression.from_sklearn("diabetes").target_names == ("progression",)
    digits = Regression.from_sklearn("digits", targets=["3", 7])
    assert digits.target_names == ("3", "7")
    left = set(sklearn.datasets.load_digits().feature_names) - set(digits.input_names)
    assert left == {"pixel_0_0", "pixel_4_0", "pixel_4_7"}


def test_bundled_whitening():
    data = Regression.from_sklearn("wine", whiten=True)
    assert np.array_equal(data.sxx, np.eye(13))
    assert data.target.shape == (3, 13)


def test_bad_bundled_tables():
    with pytest.raises(ValueError, match=r"data\.name: no bundled table 'boston'.*'diabetes'"):
        Regression.from_sklearn.__func__.__wrapped__(Regression, "boston")
    with pytest.raises(ValueError, match=r"data\.targets: no column 'lily'.*'setosa'"):
        Regression.from_sklearn("iris", targets="lily")
    with pytest.raises(ValueError, match="constant columns 'pixel_0_0', 'pixel_4_0', 'pixel_4_7'"):
        Regression.from_sklearn("digits", drop_constant=False)


# Refusals

X = np.array([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0]])
Y = np.array([1.0, 2.0, 3.0])
NAN = np.array([[1.0, 2.0], [3.0, np.nan], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (X[:, 0], Y, {}, r"data\.x: needs shape .* got \(3,\); .*\[:, None\]"),
        (X[:2], Y, {}, r"data\.y: has 3 rows but x has 2"),
        (X[:0], Y[:0], {}, r"data\.x: is empty \(shape \(0, 2\)\)"),
        (X[:, :0], Y, {}, r"data\.x: is empty \(shape \(3, 0\)\)"),
        (NAN, Y, {}, r"data\.x: 1 entries .* nan in row 1 .*column 1 \('x2'\)"),
        (X, [1.0, np.inf, 2.0], {}, r"data\.y: 1 entries .* inf in row 1 .*column 0 \('y1'\)"),
        (X, ["a", "b", "c"], {}, r"data\.y: needs real numbers"),
        (X * 1j, Y, {}, r"data\.x: needs real numbers, got complex128"),
        ([[1.0], [1.0, 2.0]], [1.0, 2.0], {}, r"data\.x: rows differ in length"),
        (X, [[1.0], [1.0, 2.0], [3.0]], {}, r"data\.y: rows differ in length"),
        (X, Y, {"input_names": ["a"]}, r"data\.x: has 2 columns but 1 names \['a'\]"),
        (X, 0 * Y, {"standardize": True}, r"data\.y: cannot standardise .* 0\.0 in every row"),
        (X * [1, 0], Y, {"standardize": "inputs"}, r"data\.x: cannot .*'x2'.*drop_constant=True"),
        (X[:1], Y[:1], {"standardize": "inputs"}, r"data\.x: cannot standardise .*'x1', 'x2'"),
        (X[:, [0, 0]], Y, {"whiten": True}, r"data\.x: cannot be whitened.*\(rank 1\)"),
        (X[:1], Y[:1], {"whiten": True}, r"data\.x: cannot be whitened.* 1 samples"),
        (0 * X, Y, {"whiten": True}, r"data\.x: cannot be whitened.*\(rank 0\)"),
        (pd.DataFrame({"s": ["f", "m", "f"]}), Y, {}, r"data\.x: column 's' is not numeric.*'f'"),
        (pd.DataFrame(X), pd.Series(Y, index=[2, 1, 0]), {}, r"data\.y: its row labels differ"),
    ],
)
def test_bad_samples(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        Regression.from_samples(x, y, **options)


def test_bad_standardize():
    unchecked = Regression.from_samples.__func__.__wrapped__
    for wrong in ("input", None, 1):
        with pytest.raises(ValueError, match=r"data\.standardize: got .* choose 'inputs'"):
            unchecked(Regression, X, Y, standardize=wrong)


EYE = np.eye(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sxx": EYE[:1], "syx": EYE}, r"data\.sxx: needs shape \(d_0, d_0\), got \(1, 2\)"),
        ({"sxx": EYE, "syx": [[1.0], [0.0]]}, r"data\.syx: needs shape .* got \(2, 1\)"),
        ({"sxx": EYE, "syx": [1.0, 0.0]}, r"data\.syx: needs shape .* got \(2,\)"),
        ({"sxx": EYE, "syx": EYE[:1], "syy": EYE}, r"data\.syy: needs shape \(1, 1\)"),
        ({"sxx": [[1, 0.5], [0.4, 1]], "syx": EYE}, r"data\.sxx: is not symmetric.* 0\.5 .* 0\.4"),
        ({"sxx": [[1, 2], [2, 1]], "syx": EYE}, r"data\.sxx: is not a covariance.* -1"),
        ({"sxx": EYE, "syx": EYE, "syy": -EYE}, r"data\.syy: is not a covariance"),
        ({"sxx": EYE, "syx": 2 * EYE, "syy": EYE}, r"data\.syy: the joint moments .*\(-1 "),
        ({"sxx": [[1, 0], [0, 0]], "syx": EYE}, r"data\.syx: .* outside .*\(rank 1 of 2\)"),
        ({"sxx": [[1, np.nan], [0, 0]], "syx": EYE}, r"data\.sxx: 1 entries .*nan at .*\(0, 1\)"),
        ({"sxx": EYE, "syx": EYE, "n": 0}, r"data\.n: got 0; "),
        ({"sxx": EYE, "syx": EYE, "n": 0.5}, r"data\.n: got 0\.5; "),
        ({"sxx": EYE, "syx": EYE, "n": np.nan}, r"data\.n: .*not finite"),
        ({"sxx": EYE, "syx": EYE, "input_names": ["a"]}, r"data\.input_names: has 2 columns"),
    ],
)
def test_bad_moments(arguments, message):
    unchecked = Regression.from_moments.__func__.__wrapped__
    with pytest.raises(ValueError, match=message):
        unchecked(Regression, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": [1.0, 2.0]}, r"data\.target: needs shape \(d_N, d_0\), got \(2,\)"),
        ({"target": []}, r"data\.target: is empty"),
        ({"target": "one"}, r"data\.target: needs real numbers"),
        ({"target": EYE, "residual": -1.0}, r"data\.residual: is not a covariance.* -1"),
        ({"target": EYE, "residual": [[1.0]]}, r"data\.residual: needs shape \(2, 2\)"),
    ],
)
def test_bad_whitened(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regression.whitened(**arguments)


def test_bad_arrays():
    arrays = Regression.from_samples(X, Y).to_arrays()
    for missing in ("sxx", "n", "y"):
        with pytest.raises(ValueError, match=re.escape(f"arrays ['{missing}'] are missing")):
            Regression.from_arrays({k: v for k, v in arrays.items() if k != missing})


def test_text_in_a_column_is_found_where_it_stands(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,y\n1.5,1\n2.5,2\nfoo,3\n")
    with pytest.raises(ValueError, match=r"column 'a' is not numeric .*row 2, .*'foo'"):
        Regression.from_file(path, targets="y")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda m: gf.Regression.from_samples(m, np.ones((2, 1))), "data.x"),
        (lambda m: gf.Regression.from_samples(np.array([[1.0], [2.0]]), m), "data.y"),
        (lambda m: gf.Regression.whitened(m), "data.target"),
        (lambda m: gf.DeepLinear([m]), "weights: W_1"),
    ],
)
def test_a_mask_is_not_dropped_in_silence(make, field):
    masked = np.ma.masked_array([[1.0], [1e6]], mask=[[False], [True]])
    with pytest.raises(ValueError, match=f"{field}.* masked array, whose mask would be lost"):
        make(masked)


def test_it_is_printed_in_a_few_words():
    data = gf.Regression.from_samples([[1.0], [1.0]], [[0.0], [1.0]])  # 1/2 mean (1/2)^2 is left
    assert repr(data) == "Regression(2 rows, 1 input, 1 target, least loss 0.125)"
    population = gf.Regression.whitened(np.ones((2, 3)), residual=1.5)
    words = "Regression(Gaussian population, 3 inputs, 2 targets, least loss 1.5)"
    assert repr(population) == words
    seen = []
    jax.jit(lambda d: seen.append(repr(d)) or d.syx)(data)
    assert seen == ["Regression(2 rows, 1 input, 1 target, least loss traced)"]
    jax.jit(lambda t: seen.append(repr(gf.Regression.whitened(t))) or t)(np.ones((1, 3)))
    assert seen[-1] == "Regression(Gaussian population, 3 inputs, 1 target, least loss traced)"
    jax.jit(lambda t: seen.append(repr(population)) or t)(1.0)
    assert seen[-1] == words
    assert repr(jax.eval_shape(lambda d: d, data)).startswith("Regression(2 rows")
    assert repr(jax.tree.map(lambda _: None, data)).startswith("Regression(")
    assert repr(jax.tree.map(lambda a: jnp.stack([a, a]), data)).startswith("Regression(")
