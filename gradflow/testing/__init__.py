"""For property tests of your own: hypothesis strategies and assertions about training dynamics.

Needs hypothesis, which `pip install 'gradflow[test]'` brings. `import gradflow` does not import it.
"""

from gradflow.testing import needs as needs  # isort: skip  # says what to install, before the rest
from gradflow.testing import strategies as strategies
from gradflow.testing.conservation import assert_conserves as assert_conserves
from gradflow.testing.distribution import (
    Match as Match,
    assert_matches_in_distribution as assert_matches_in_distribution,
)
from gradflow.testing.equivariance import assert_equivariant as assert_equivariant
from gradflow.testing.orders import assert_order as assert_order
from gradflow.testing.strategies import (
    conditioned as conditioned,
    data as data,
    entries as entries,
    invertible as invertible,
    matrices as matrices,
    networks as networks,
    orthogonal as orthogonal,
    problems as problems,
    regularizers as regularizers,
    seeds as seeds,
    shapes as shapes,
    stability_limit as stability_limit,
    step_sizes as step_sizes,
)
from gradflow.testing.transformations import (
    TRANSFORMATIONS as TRANSFORMATIONS,
    Transformation as Transformation,
    change_of_basis as change_of_basis,
    rotated as rotated,
    transformation as transformation,
)
