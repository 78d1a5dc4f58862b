"""What a network is like where the slow flow ends."""

from dataclasses import dataclass

import numpy as np

from gradflow.data import Regression
from gradflow.geometry.curvature import hessian_block_traces, minima_spectrum
from gradflow.geometry.imbalance import imbalance, squared_norms
from gradflow.network import DeepLinear
from gradflow.problem import Problem


@dataclass(frozen=True)
class EndPoint:
    r"""The stationary point of the slow flow.

    - `net`: the network; `imbalance`: its $D$.
    - `squared_norms`: $|W_i|^2$; `norm_ratios`: $|W_{i+1}|^2 / |W_i|^2$.
    - `block_traces`: traces of the Hessian's diagonal blocks; their sum is $\mathrm{tr} H$.
    - `sharpness`: $\lambda_\mathrm{max}$.
    """

    net: DeepLinear
    imbalance: float
    squared_norms: tuple[float, ...]
    norm_ratios: tuple[float, ...]
    block_traces: tuple[float, ...]
    sharpness: float


def end_point(problem: Problem, net: DeepLinear) -> EndPoint:
    """What a minimum is like where the slow flow ends."""
    data = Regression.from_moments(problem.input_moment, problem.data.syx, problem.data.syy)
    norms = np.asarray(squared_norms(net))
    return EndPoint(
        net=net,
        imbalance=float(imbalance(net)),
        squared_norms=tuple(map(float, norms)),
        norm_ratios=tuple(map(float, norms[1:] / norms[:-1])),
        block_traces=tuple(map(float, hessian_block_traces(net, data))),
        sharpness=float(minima_spectrum(net, problem.input_moment)[-1]),
    )
