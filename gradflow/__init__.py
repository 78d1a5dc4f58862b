"""gradflow: the reference laboratory for the training dynamics of deep linear networks."""

import os

import jax

if os.environ.get("GRADFLOW_X64", "1") != "0":
    jax.config.update("jax_enable_x64", True)

from gradflow import init as init
from gradflow.analysis import (
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
from gradflow.data import Regression as Regression
from gradflow.dynamics import (
    AbstractDynamics as AbstractDynamics,
    GradientDescent as GradientDescent,
    GradientFlow as GradientFlow,
    StochasticFlow as StochasticFlow,
)
from gradflow.geometry import (
    balancedness as balancedness,
    hessian_block_traces as hessian_block_traces,
    hessian_trace as hessian_trace,
    imbalance as imbalance,
    minima_spectrum as minima_spectrum,
    sharpness as sharpness,
)
from gradflow.loss import (
    end_to_end_gradient as end_to_end_gradient,
    gradient as gradient,
    loss as loss,
    per_sample_gradients as per_sample_gradients,
)
from gradflow.network import DeepLinear as DeepLinear
from gradflow.observables import Observable as Observable
from gradflow.problem import Problem as Problem
from gradflow.regularizers import (
    AbstractRegularizer as AbstractRegularizer,
    InputNoise as InputNoise,
    LabelNoise as LabelNoise,
    Minibatch as Minibatch,
    WeightDecay as WeightDecay,
)
from gradflow.simulate import repeat as repeat, simulate as simulate
from gradflow.trajectory import Trajectory as Trajectory
