"""Geometry of the weight space: imbalance, curvature and the minima manifold."""

from gradflow.geometry.bounds import (
    sharpness_bound as sharpness_bound,
    trace_bound as trace_bound,
)
from gradflow.geometry.coordinates import (
    local_coordinates as local_coordinates,
    network_at as network_at,
)
from gradflow.geometry.curvature import (
    ExtremeEigenvalues as ExtremeEigenvalues,
    end_to_end_kernel as end_to_end_kernel,
    extreme_eigenvalues as extreme_eigenvalues,
    hessian_block_traces as hessian_block_traces,
    hessian_trace as hessian_trace,
    minima_spectrum as minima_spectrum,
    sharpness as sharpness,
)
from gradflow.geometry.flattest import (
    FlatnessGap as FlatnessGap,
    FlattestMinimum as FlattestMinimum,
    flatness_gap as flatness_gap,
    flattest_minimum as flattest_minimum,
)
from gradflow.geometry.hessian import (
    hessian as hessian,
    hessian_vector_product as hessian_vector_product,
)
from gradflow.geometry.imbalance import (
    balancedness as balancedness,
    imbalance as imbalance,
    squared_norms as squared_norms,
)
from gradflow.geometry.limit_maps import (
    Outcome as Outcome,
    descent_limit as descent_limit,
    descent_projection as descent_projection,
    flow_limit as flow_limit,
    flow_projection as flow_projection,
)
from gradflow.geometry.manifold import (
    distance_to_manifold as distance_to_manifold,
    is_on_manifold as is_on_manifold,
    manifold_residual as manifold_residual,
    nearest_minimum as nearest_minimum,
    retract as retract,
    tangent as tangent,
    why_singular as why_singular,
)
from gradflow.geometry.spectrum import (
    SpectralDensity as SpectralDensity,
    hessian_spectrum as hessian_spectrum,
    spectral_density as spectral_density,
)
