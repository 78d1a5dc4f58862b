"""Regression data: moments, samples, and loaders of real files."""

from gradflow.data.regression import Regression as Regression
