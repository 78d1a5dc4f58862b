from . import init as init
from .analysis import (
    Comparison as Comparison,
    EndPoint as EndPoint,
    Orders as Orders,
    Phases as Phases,
    Prediction as Prediction,
    Rate as Rate,
    RateLaw as RateLaw,
    compare as compare,
    compare_trajectories as compare_trajectories,
    decay_rate as decay_rate,
    drift as drift,
    orders as orders,
    phases as phases,
    predict as predict,
)
from .data import Regression as Regression
from .dynamics import (
    SVAG as SVAG,
    AbstractDynamics as AbstractDynamics,
    ExactFlow as ExactFlow,
    FromOptax as FromOptax,
    GradientDescent as GradientDescent,
    GradientFlow as GradientFlow,
    HeavyBallFlow as HeavyBallFlow,
    ModifiedFlow as ModifiedFlow,
    PrincipalFlow as PrincipalFlow,
    SlowFlow as SlowFlow,
    StochasticFlow as StochasticFlow,
)
from .geometry import (
    FlatnessGap as FlatnessGap,
    FlattestMinimum as FlattestMinimum,
    balancedness as balancedness,
    descent_projection as descent_projection,
    distance_to_manifold as distance_to_manifold,
    extreme_eigenvalues as extreme_eigenvalues,
    flatness_gap as flatness_gap,
    flattest_minimum as flattest_minimum,
    flow_projection as flow_projection,
    hessian as hessian,
    hessian_block_traces as hessian_block_traces,
    hessian_spectrum as hessian_spectrum,
    hessian_trace as hessian_trace,
    hessian_vector_product as hessian_vector_product,
    imbalance as imbalance,
    local_coordinates as local_coordinates,
    minima_spectrum as minima_spectrum,
    nearest_minimum as nearest_minimum,
    network_at as network_at,
    sharpness as sharpness,
    sharpness_bound as sharpness_bound,
    spectral_density as spectral_density,
    trace_bound as trace_bound,
)
from .loss import (
    end_to_end_gradient as end_to_end_gradient,
    gradient as gradient,
    loss as loss,
    per_sample_gradients as per_sample_gradients,
)
from .network import DeepLinear as DeepLinear
from .observables import Observable as Observable
from .problem import Problem as Problem
from .random.streams import Normals as Normals
from .regularizers import (
    AbstractActivationNoise as AbstractActivationNoise,
    AbstractBatch as AbstractBatch,
    AbstractDataNoise as AbstractDataNoise,
    AbstractGradientNoise as AbstractGradientNoise,
    AbstractLayerNoise as AbstractLayerNoise,
    AbstractPenalty as AbstractPenalty,
    AbstractRegularizer as AbstractRegularizer,
    AbstractWeightNoise as AbstractWeightNoise,
    DropConnect as DropConnect,
    Dropout as Dropout,
    GradientNoise as GradientNoise,
    InputNoise as InputNoise,
    LabelNoise as LabelNoise,
    Minibatch as Minibatch,
    Penalty as Penalty,
    WeightDecay as WeightDecay,
    WeightNoise as WeightNoise,
)
from .results.ensemble_statistics import EnsembleStatistics as EnsembleStatistics
from .results.trajectory import Trajectory as Trajectory
from .simulation.divergence import DivergedWarning as DivergedWarning
from .simulation.rounding import RoundingWarning as RoundingWarning
from .simulation.simulate import (
    IncompleteWarning as IncompleteWarning,
    InterruptedWarning as InterruptedWarning,
    repeat as repeat,
    simulate as simulate,
)
from .solvers import GaussLegendre as GaussLegendre
