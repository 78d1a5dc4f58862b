"""The loss as a function of the end-to-end matrix: what the geometry is made of."""

import equinox as eqx
from jaxtyping import Array, Float

from gradflow.data import Regression
from gradflow.problem import Problem
from gradflow.types import EndToEnd


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
    problem = data if isinstance(data, Problem) else Problem(data)
    inverse = problem.noisy_inverse_root
    y = problem.data.syx
    return OutputLoss(problem.input_moment, y, problem.noisy_root, inverse, y @ inverse @ inverse)
