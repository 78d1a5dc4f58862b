"""Dynamics: ways to move the weights, all acting on the same problem."""

from gradflow.dynamics.base import (
    DYNAMICS as DYNAMICS,
    AbstractDynamics as AbstractDynamics,
    State as State,
)
from gradflow.dynamics.descent import GradientDescent as GradientDescent
from gradflow.dynamics.exact_flow import ExactFlow as ExactFlow
from gradflow.dynamics.from_optax import FromOptax as FromOptax
from gradflow.dynamics.gradient_flow import GradientFlow as GradientFlow
from gradflow.dynamics.heavy_ball_flow import HeavyBallFlow as HeavyBallFlow
from gradflow.dynamics.modified_flow import ModifiedFlow as ModifiedFlow
from gradflow.dynamics.principal_flow import PrincipalFlow as PrincipalFlow
from gradflow.dynamics.slow_flow import SlowFlow as SlowFlow
from gradflow.dynamics.stochastic_flow import StochasticFlow as StochasticFlow
from gradflow.dynamics.svag import SVAG as SVAG
