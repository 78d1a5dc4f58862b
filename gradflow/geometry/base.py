"""What the geometry is made of: the loss of the end-to-end matrix; and what is given to it."""

import equinox as eqx
from jaxtyping import Array, Float

from gradflow.backend.types import EndToEnd, Weights
from gradflow.checks import check_fit
from gradflow.data import Regression
from gradflow.network import DeepLinear
from gradflow.problem import Problem


class OutputLoss(eqx.Module):
    r"""$\ell(P) = \tfrac12 \mathrm{tr}(P S P^\top) - \langle P, Y \rangle$ up to a constant.

    - `s`: $S$, the second moment of the inputs, noise on them included, `(d_0, d_0)`.
    - `y`: $Y$, the target-input moment, `(d_N, d_0)`.
    - `root`, `inverse_root`: $S^{1/2}$ and its pseudo-inverse.
    - `target`: $T = Y S^+$, the minimiser of least norm; minima have $P S^{1/2} = T S^{1/2}$.
    """

    s: Float[Array, "d_in d_in"]
    y: EndToEnd
    root: Float[Array, "d_in d_in"]
    inverse_root: Float[Array, "d_in d_in"]
    target: EndToEnd


def output_loss(data: Regression | Problem) -> OutputLoss:
    """The part of the averaged loss that is a function of the end-to-end matrix.

    Noise on the inputs belongs to it; penalties and noise inside the network do not.
    """
    check_data(data)
    problem = data if isinstance(data, Problem) else Problem(data)
    inverse = problem.noisy_inverse_root
    y = problem.data.syx
    return OutputLoss(problem.input_moment, y, problem.noisy_root, inverse, y @ inverse @ inverse)


def as_problem(net: DeepLinear, data: Regression | Problem) -> Problem:
    """The data as a problem, checked to fit the network.

    **Raises:** `TypeError` for something that is no network or no data, `ValueError` if the widths
    of network and data differ.
    """
    check_network(net)
    check_data(data)
    problem = data if isinstance(data, Problem) else Problem(data)
    check_widths(net, problem)
    return problem


def check_network(net: object) -> None:
    """Raise a `TypeError` for something that is not a network."""
    if not isinstance(net, DeepLinear):
        raise TypeError(f"net must be a DeepLinear; got {_name(net)}.{_order(net)}")


def check_data(data: object) -> None:
    """Raise a `TypeError` for something that is neither data nor a problem."""
    if not isinstance(data, Regression | Problem):
        raise TypeError(f"data must be a Regression or a Problem; got {_name(data)}.{_order(data)}")


def check_problem(problem: object) -> None:
    """Raise a `TypeError` for something that is not a problem."""
    if not isinstance(problem, Problem):
        raise TypeError(
            f"problem must be a Problem such as Problem(data, [...]); got {_name(problem)}."
        )


def check_widths(net: DeepLinear, problem: Problem) -> None:
    """Raise a `ValueError` if the first and the last width are not those of the data."""
    check_fit("net: widths", net.widths, problem.data.d_in, problem.data.d_out)


def check_double(weights: Weights, what: str) -> None:
    """Raise a `ValueError` for weights in single precision, which cannot reach the manifold."""
    if weights[0].dtype.itemsize < 8:
        raise ValueError(
            f"net: {what} needs double precision, but the weights are {weights[0].dtype}: the "
            "minima manifold is reached to 1e-10. Run without GRADFLOW_X64=0."
        )


def _name(given: object) -> str:
    return type(given).__name__


def _order(given: object) -> str:
    """A hint where arguments were swapped."""
    swapped = isinstance(given, DeepLinear | Regression | Problem)
    return " Functions of both take the network first, then the data." if swapped else ""
