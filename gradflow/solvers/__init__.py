"""Pieces that plug into diffrax."""

from gradflow.solvers.dormand_prince import DormandPrince853 as DormandPrince853
from gradflow.solvers.gauss_legendre import GaussLegendre as GaussLegendre
from gradflow.solvers.grid_path import GridBrownianPath as GridBrownianPath
from gradflow.solvers.relative_errors import RelativeErrors as RelativeErrors
from gradflow.solvers.rest import RestController as RestController
from gradflow.solvers.resumable import ResumableController as ResumableController
from gradflow.solvers.small_noise import SmallNoise as SmallNoise
from gradflow.solvers.stabilized import Stabilized5 as Stabilized5
from gradflow.solvers.switching import Switching as Switching
