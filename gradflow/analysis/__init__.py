"""Analysis: statements about runs, with uncertainties."""

from gradflow.analysis.comparison.compare import (
    Comparison as Comparison,
    ComparisonRow as ComparisonRow,
    compare as compare,
    compare_trajectories as compare_trajectories,
)
from gradflow.analysis.convergence.orders import orders as orders
from gradflow.analysis.convergence.results import OrderRow as OrderRow, Orders as Orders
from gradflow.analysis.phases import Phases as Phases, phases as phases
from gradflow.analysis.prediction.end_point import EndPoint as EndPoint
from gradflow.analysis.prediction.predict import predict as predict
from gradflow.analysis.prediction.prediction import Prediction as Prediction
from gradflow.analysis.prediction.rate_law import RateLaw as RateLaw
from gradflow.analysis.rates import Rate as Rate, decay_rate as decay_rate, drift as drift
