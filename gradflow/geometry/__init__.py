"""Geometry of the weight space: imbalance and curvature."""

from gradflow.geometry.curvature import (
    end_to_end_kernel as end_to_end_kernel,
    hessian_block_traces as hessian_block_traces,
    hessian_trace as hessian_trace,
    minima_spectrum as minima_spectrum,
    sharpness as sharpness,
)
from gradflow.geometry.imbalance import (
    balancedness as balancedness,
    imbalance as imbalance,
    squared_norms as squared_norms,
)
