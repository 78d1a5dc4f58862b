"""Changes of network and data that loss, gradient and dynamics must follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ortho_group

from gradflow.data import Regression
from gradflow.network import DeepLinear
from gradflow.testing.running import Layers

OptionalLayers = Sequence[np.ndarray | None]
"""Layers of which some are not determined."""


@dataclass(frozen=True)
class Transformation:
    r"""A change of network and data together, and what it does to loss, gradient and training.

    - `name`: what it is called in messages.
    - `layers`: the layers of the changed network from those of the network.
    - `data`: the changed data from the data.
    - `gradient`: the gradient at the changed network from the gradient at the network; None for a
        layer about which nothing is said.
    - `loss_factor`: the loss of the changed network over that of the network.
    - `clock`: flow time of the changed network over that of the network, so that training follows
        $T(W)(c\,t) = T(W(t))$; None if training does not follow the change.
    """

    name: str
    layers: Callable[[Layers], Layers]
    data: Callable[[Regression], Regression]
    gradient: Callable[[Layers], OptionalLayers]
    loss_factor: float = 1.0
    clock: float | None = 1.0


def rotated(
    data: Regression, inputs: np.ndarray | None = None, outputs: np.ndarray | None = None
) -> Regression:
    r"""The data of $x \to U x$ and $y \to V y$ with matrices `inputs` $U$ and `outputs` $V$."""
    u = np.eye(data.d_in) if inputs is None else inputs
    v = np.eye(data.d_out) if outputs is None else outputs
    if data.x is not None and data.y is not None:
        return Regression.from_samples(np.asarray(data.x) @ u.T, np.asarray(data.y) @ v.T)
    sxx, syx, syy = (np.asarray(moment) for moment in (data.sxx, data.syx, data.syy))
    sxx, syy = u @ sxx @ u.T, v @ syy @ v.T
    return Regression.from_moments(
        (sxx + sxx.T) / 2, v @ syx @ u.T, (syy + syy.T) / 2, n=float(data.n)
    )


def change_of_basis(
    name: str,
    changes: Sequence[np.ndarray],
    data: Callable[[Regression], Regression] = lambda data: data,
) -> Transformation:
    r"""$W_i \to R_i W_i R_{i-1}^{-1}$, $g_i \to R_i^{-\top} g_i R_{i-1}^\top$.

    **Arguments:**

    - `changes`: the invertible matrices $(R_0, ..., R_N)$, one a width. Training follows if all of
        them are orthogonal.
    - `data`: what becomes of the data; they must be those of $x \to R_0 x$, $y \to R_N y$.
    """
    inverses = [np.linalg.inv(r) for r in changes]
    orthogonal = all(np.allclose(r @ r.T, np.eye(len(r)), rtol=0, atol=1e-10) for r in changes)

    def layers(weights: Layers) -> Layers:
        return [changes[i + 1] @ w @ inverses[i] for i, w in enumerate(weights)]

    def gradient(slopes: Layers) -> Layers:
        return [inverses[i + 1].T @ g @ changes[i].T for i, g in enumerate(slopes)]

    return Transformation(name, layers, data, gradient, clock=1.0 if orthogonal else None)


Build = Callable[[DeepLinear, Regression, np.random.Generator], Transformation]
"""A transformation that fits network and data."""


def _hidden_rotations(
    net: DeepLinear, data: Regression, rng: np.random.Generator
) -> Transformation:
    turns = [np.eye(net.widths[0]), *(_turn(d, rng) for d in net.widths[1:-1])]
    return change_of_basis("hidden_rotations", [*turns, np.eye(net.widths[-1])])


def _hidden_changes(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    hidden = [_turn(d, rng) * np.exp(rng.uniform(-0.7, 0.7, size=d)) for d in net.widths[1:-1]]
    hidden = [h @ _turn(len(h), rng) for h in hidden]
    ends = np.eye(net.widths[0]), np.eye(net.widths[-1])
    return change_of_basis("hidden_changes", [ends[0], *hidden, ends[1]])


def _input_rotation(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    turn = _turn(net.widths[0], rng)
    changes = [turn, *(np.eye(d) for d in net.widths[1:])]
    return change_of_basis("input_rotation", changes, lambda data: rotated(data, inputs=turn))


def _output_rotation(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    turn = _turn(net.widths[-1], rng)
    changes = [*(np.eye(d) for d in net.widths[:-1]), turn]
    return change_of_basis("output_rotation", changes, lambda data: rotated(data, outputs=turn))


def _rotations(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    turns = [_turn(d, rng) for d in net.widths]
    first, last = turns[0], turns[-1]
    return change_of_basis("rotations", turns, lambda data: rotated(data, first, last))


def _reversal(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    variance = float(data.sxx[0, 0])
    if not np.allclose(data.sxx, variance * np.eye(data.d_in), rtol=0, atol=1e-10):
        raise ValueError(
            "transformation: 'reversal' is a symmetry only if sxx is a multiple of the identity; "
            "draw data with whitened=True."
        )

    def mirrored(data: Regression) -> Regression:
        syx = np.asarray(data.syx)
        sxx = variance * np.eye(data.d_out)
        rest = max(float(np.trace(data.syy)) - float(np.sum(syx**2)) / max(variance, 1e-300), 0.0)
        syy = syx.T @ syx / max(variance, 1e-300) + rest / data.d_in * np.eye(data.d_in)
        return Regression.from_moments(sxx, syx.T, (syy + syy.T) / 2, n=float(data.n))

    def transposed(layers: Layers) -> Layers:
        return [w.T for w in reversed(layers)]

    return Transformation("reversal", transposed, mirrored, transposed)


def _zero_padding(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    last = net.depth - 1

    def padded(layers: Layers) -> Layers:
        margins = [((0, int(i < last)), (0, int(i > 0))) for i in range(len(layers))]
        return [np.pad(w, m) for w, m in zip(layers, margins, strict=True)]

    return Transformation("zero_padding", padded, lambda data: data, padded)


def _input_scaling(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    a = float(rng.choice([0.5, 2.0, -3.0]))

    def layers(weights: Layers) -> Layers:
        return [weights[0] / a, *weights[1:]]

    def gradient(slopes: Layers) -> Layers:
        return [slopes[0] * a, *slopes[1:]]

    stretch = a * np.eye(net.widths[0])
    return Transformation(
        "input_scaling", layers, lambda data: rotated(data, inputs=stretch), gradient, clock=None
    )


def _homogeneity(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    k = float(rng.choice([0.5, 2.0, -2.0]))
    depth = net.depth
    stretch = k**depth * np.eye(net.widths[-1])
    return Transformation(
        "homogeneity",
        lambda weights: [k * w for w in weights],
        lambda data: rotated(data, outputs=stretch),
        lambda slopes: [k ** (2 * depth - 1) * g for g in slopes],
        loss_factor=k ** (2 * depth),
        clock=k ** (2 - 2 * depth),
    )


def _sample_permutation(
    net: DeepLinear, data: Regression, rng: np.random.Generator
) -> Transformation:
    if data.x is None or data.y is None:
        raise ValueError(
            "transformation: 'sample_permutation' needs a finite sample; draw data with "
            "population=False."
        )
    order = rng.permutation(data.x.shape[0])

    def permuted(data: Regression) -> Regression:
        x, y = np.asarray(data.x), np.asarray(data.y)
        return Regression.from_samples(x[order], y[order])

    return Transformation("sample_permutation", _same, permuted, _same)


def _identity_layer(net: DeepLinear, data: Regression, rng: np.random.Generator) -> Transformation:
    place = int(rng.integers(0, net.depth + 1))
    width = net.widths[place]

    def layers(weights: Layers) -> Layers:
        return [*weights[:place], np.eye(width), *weights[place:]]

    def gradient(slopes: Layers) -> OptionalLayers:
        return [*slopes[:place], None, *slopes[place:]]

    return Transformation("identity_layer", layers, lambda data: data, gradient, clock=None)


TRANSFORMATIONS: dict[str, Build] = {
    "hidden_rotations": _hidden_rotations,
    "hidden_changes": _hidden_changes,
    "input_rotation": _input_rotation,
    "output_rotation": _output_rotation,
    "rotations": _rotations,
    "reversal": _reversal,
    "zero_padding": _zero_padding,
    "input_scaling": _input_scaling,
    "homogeneity": _homogeneity,
    "sample_permutation": _sample_permutation,
    "identity_layer": _identity_layer,
}
"""The transformations known by name."""


def transformation(name: str, net: DeepLinear, data: Regression, seed: int = 0) -> Transformation:
    r"""A transformation that fits network and data, with random matrices of a seed.

    **Arguments:**

    - `name`: one of

        - `hidden_rotations`: $W_i \to R_i W_i R_{i-1}^\top$ with orthogonal $R$ on hidden layers;
        - `hidden_changes`: the same with any invertible $R$ (training does not follow it);
        - `input_rotation`, `output_rotation`: $x \to R x$ or $y \to R y$ with the first or last
            layer turned along; `rotations`: of inputs, outputs and all hidden layers at once;
        - `reversal`: $W_i \to W_{N+1-i}^\top$, $\Sigma_{yx} \to \Sigma_{yx}^\top$ (needs
            $\Sigma_{xx} \propto I$);
        - `zero_padding`: one more hidden unit in every hidden layer, without weights;
        - `input_scaling`: $x \to a x$, $W_1 \to W_1/a$ (training does not follow it);
        - `homogeneity`: $W_i \to k W_i$, $y \to k^N y$, time divided by $k^{2N-2}$;
        - `sample_permutation`: the samples in another order;
        - `identity_layer`: one more layer, the identity (training does not follow it).
    - `seed`: of the random matrices and numbers.

    **Raises:** `ValueError` for an unknown name, or data that do not have the symmetry.
    """
    if name not in TRANSFORMATIONS:
        raise ValueError(
            f"transformation: {name!r} is not known; choose from {', '.join(TRANSFORMATIONS)}, or "
            "give a Transformation of your own."
        )
    return TRANSFORMATIONS[name](net, data, np.random.default_rng(seed))


def _same(layers: Layers) -> Layers:
    return layers


def _turn(d: int, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random orthogonal matrix."""
    if d == 1:
        return np.array([[float(rng.choice([1.0, -1.0]))]])
    return np.asarray(ortho_group.rvs(d, random_state=rng))
