"""Array aliases shared by every room."""

from typing import TypeAlias

from jaxtyping import Array, Float

Weights: TypeAlias = tuple[Float[Array, "..."], ...]
"""The layers ``(W_1, ..., W_N)`` of one network, first layer first; ``W_i`` is ``(d_i, d_{i-1})``.

An ensemble is the same tuple with one more axis at the **end** of every layer, the path axis:
contiguous paths let XLA vectorise small layers over the ensemble.
"""

Scalar: TypeAlias = Float[Array, ""]
EndToEnd: TypeAlias = Float[Array, "d_out d_in"]
"""A ``(d_N, d_0)`` matrix: the network's end-to-end matrix or a gradient with respect to it."""
