"""Pieces that plug into diffrax."""

from gradflow.solvers.grid_path import GridBrownianPath as GridBrownianPath
from gradflow.solvers.resumable import ResumableController as ResumableController
