"""What theory predicts at given weights: noise covariance, loss floors, expected drifts."""

from gradflow.theory.drift import (
    expected_balancedness_drift as expected_balancedness_drift,
    flow_balancedness_drift as flow_balancedness_drift,
    flow_imbalance_drift as flow_imbalance_drift,
    imbalance_drift as imbalance_drift,
)
from gradflow.theory.floor import (
    noise_floor as noise_floor,
    slaved_residual as slaved_residual,
    weight_decay_plateau as weight_decay_plateau,
)
from gradflow.theory.noise import noise_covariance as noise_covariance
from gradflow.theory.slow_drift import slow_drift as slow_drift
from gradflow.theory.stationary import (
    largest_step_size as largest_step_size,
    stationary_covariance as stationary_covariance,
)
