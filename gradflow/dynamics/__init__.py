"""Dynamics: ways to move the weights, all acting on the same problem."""

from gradflow.dynamics.base import AbstractDynamics as AbstractDynamics, State as State
from gradflow.dynamics.descent import GradientDescent as GradientDescent
from gradflow.dynamics.gradient_flow import GradientFlow as GradientFlow
from gradflow.dynamics.stochastic_flow import StochasticFlow as StochasticFlow
