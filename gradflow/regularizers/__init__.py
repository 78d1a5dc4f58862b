"""Regularizers: one mechanism a file, three faces each (sampled, averaged, diffusion)."""

from gradflow.regularizers.base import (
    REGULARIZERS as REGULARIZERS,
    AbstractActivationNoise as AbstractActivationNoise,
    AbstractBatch as AbstractBatch,
    AbstractDataNoise as AbstractDataNoise,
    AbstractEndToEndNoise as AbstractEndToEndNoise,
    AbstractGradientNoise as AbstractGradientNoise,
    AbstractLayerNoise as AbstractLayerNoise,
    AbstractPenalty as AbstractPenalty,
    AbstractRegularizer as AbstractRegularizer,
    AbstractWeightNoise as AbstractWeightNoise,
)
from gradflow.regularizers.drop_connect import DropConnect as DropConnect
from gradflow.regularizers.dropout import Dropout as Dropout
from gradflow.regularizers.gradient_noise import GradientNoise as GradientNoise
from gradflow.regularizers.input_noise import InputNoise as InputNoise
from gradflow.regularizers.label_noise import LabelNoise as LabelNoise
from gradflow.regularizers.minibatch import Minibatch as Minibatch
from gradflow.regularizers.penalty import Penalty as Penalty
from gradflow.regularizers.weight_decay import WeightDecay as WeightDecay
from gradflow.regularizers.weight_noise import WeightNoise as WeightNoise
