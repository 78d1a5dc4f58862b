"""What most test files draw: networks, data that fit them, and their shapes.

The strategies are those of `gradflow.testing`; with `HYPOTHESIS_PROFILE=explore` every depth 1..4
and every width 1..4 is drawn instead of the few shapes that share compiled programs.
"""

import os

from hypothesis import strategies as st

import gradflow as gf
import gradflow.testing as gt
from gradflow.testing.strategies.building import Draw, composite

EXPLORE = os.environ.get("HYPOTHESIS_PROFILE") == "explore"

matrices = gt.matrices


def widths(min_depth: int = 1, max_depth: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Widths (d_0, ..., d_N) of networks of the given depths."""
    return gt.shapes(min_depth=min_depth, max_depth=max_depth, every=EXPLORE)


def networks(
    shape: tuple[int, ...] | None = None, min_depth: int = 1, max_depth: int = 4
) -> st.SearchStrategy[gf.DeepLinear]:
    """Networks of the given widths, or of any."""
    return gt.networks(widths=widths(min_depth, max_depth) if shape is None else shape)


def data(d_in: int, d_out: int) -> st.SearchStrategy[gf.Regression]:
    """Data of every kind."""
    return gt.data(d_in, d_out)


def whitened(d_in: int, d_out: int) -> st.SearchStrategy[gf.Regression]:
    """Populations with inputs of unit covariance."""
    return gt.data(d_in, d_out, whitened=True)


def samples(d_in: int, d_out: int, rows: int | None = None) -> st.SearchStrategy[gf.Regression]:
    """Finite samples."""
    return gt.data(d_in, d_out, population=False, n=rows)


@composite
def cases(
    draw: Draw, kind=data, min_depth: int = 1, max_depth: int = 4
) -> tuple[gf.DeepLinear, gf.Regression]:
    """A network and data that fit each other; `kind` is one of the data strategies above."""
    shape = draw(widths(min_depth, max_depth))
    return draw(networks(shape)), draw(kind(shape[0], shape[-1]))
