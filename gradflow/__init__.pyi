from . import init as init
from .analysis import (
    Comparison as Comparison,
    Phases as Phases,
    Prediction as Prediction,
    Rate as Rate,
    compare as compare,
    compare_trajectories as compare_trajectories,
    decay_rate as decay_rate,
    drift as drift,
    phases as phases,
    predict as predict,
)
from .data import Regression as Regression
from .dynamics import (
    AbstractDynamics as AbstractDynamics,
    GradientDescent as GradientDescent,
    GradientFlow as GradientFlow,
    StochasticFlow as StochasticFlow,
)
from .geometry import (
    balancedness as balancedness,
    hessian_block_traces as hessian_block_traces,
    hessian_trace as hessian_trace,
    imbalance as imbalance,
    minima_spectrum as minima_spectrum,
    sharpness as sharpness,
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
from .regularizers import (
    AbstractRegularizer as AbstractRegularizer,
    InputNoise as InputNoise,
    LabelNoise as LabelNoise,
    Minibatch as Minibatch,
    WeightDecay as WeightDecay,
)
from .simulate import repeat as repeat, simulate as simulate
from .trajectory import Trajectory as Trajectory
