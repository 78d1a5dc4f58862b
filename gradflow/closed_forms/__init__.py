"""Closed forms of gradient flow, in the order in which they are tried."""

from gradflow.closed_forms.aligned import AlignedChains, AlignedPairs
from gradflow.closed_forms.base import AbstractClosedForm as AbstractClosedForm
from gradflow.closed_forms.chain import ScalarChain
from gradflow.closed_forms.channel import Channel
from gradflow.closed_forms.decaying_channel import DecayingChannel
from gradflow.closed_forms.linear import Linear
from gradflow.closed_forms.riccati import Riccati

CLOSED_FORMS: tuple[AbstractClosedForm, ...] = (
    Linear(),
    Channel(),
    DecayingChannel(),
    ScalarChain(),
    AlignedPairs(),
    AlignedChains(),
    Riccati(),
)
