"""The linear systems of Newton's method, of any size."""

from typing import Any

import jax
import lineax as lx

LARGEST_DENSE = 64
"""Unknowns up to which the matrix is formed and factored."""

RTOL, ATOL = 1e-6, 1e-13
"""Of a Krylov solution: Newton's next step makes up for what it leaves."""

RESTART = 40


class DenseOrKrylov(lx.AbstractLinearSolver[Any]):
    r"""Factors a small matrix $A = L U$; solves a large system from products with $A$ alone.

    The Jacobian of an implicit step of gradient flow has $n^2$ entries for $n$ weights, 2 GB at
    depth 4 and width 64, while a product with it costs two to three gradients. Its eigenvalues
    $1 + \gamma h \mu_a$ lie in as many clusters as the Hessian has scales, so GMRES needs few.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        """The factors, or the operator itself."""
        return _of_size(operator.in_size()).init(operator, options)

    def compute(
        self, state: Any, vector: Any, options: dict[str, Any]
    ) -> tuple[Any, lx.RESULTS, dict[str, Any]]:
        """The solution."""
        return _of_vector(vector).compute(state, vector, options)

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The state of the transposed system."""
        return _of_state(state).transpose(state, options)

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The state of the conjugate system."""
        return _of_state(state).conj(state, options)

    def assume_full_rank(self) -> bool:
        """True: implicit steps have one solution."""
        return True


def _of_size(size: int) -> Any:
    if size <= LARGEST_DENSE:
        return lx.LU()
    return lx.GMRES(rtol=RTOL, atol=ATOL, restart=RESTART, stagnation_iters=RESTART)


def _of_vector(vector: Any) -> Any:
    return _of_size(sum(leaf.size for leaf in jax.tree.leaves(vector)))


def _of_state(state: Any) -> Any:
    """The solver that a state belongs to: Krylov's is the operator."""
    return _of_size(state.in_size() if isinstance(state, lx.AbstractLinearOperator) else 0)
