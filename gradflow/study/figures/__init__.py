"""The kinds of figures that a study can ask for, each with its keys and how it is drawn."""

from gradflow.study.figures import (
    conservation as conservation,
    orders as orders,
    phase_portrait as phase_portrait,
    rates as rates,
    scaling as scaling,
    time_series as time_series,
)
