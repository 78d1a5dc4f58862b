"""The quantities of claims, each declared where it is measured, and the verdicts."""

from gradflow.study.claims import (
    orders as orders,
    pairs as pairs,
    rates as rates,
    scaling as scaling,
    values as values,
    weights as weights,
)
