"""Regularizers: one mechanism a file, three faces each (sampled, averaged, diffusion)."""

from gradflow.regularizers.base import (
    AbstractBatch as AbstractBatch,
    AbstractDataNoise as AbstractDataNoise,
    AbstractLayerNoise as AbstractLayerNoise,
    AbstractPenalty as AbstractPenalty,
    AbstractRegularizer as AbstractRegularizer,
)
from gradflow.regularizers.input_noise import InputNoise as InputNoise
from gradflow.regularizers.label_noise import LabelNoise as LabelNoise
from gradflow.regularizers.minibatch import Minibatch as Minibatch
from gradflow.regularizers.weight_decay import WeightDecay as WeightDecay
