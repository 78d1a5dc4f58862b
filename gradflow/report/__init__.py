"""Reports: the figures of a study and one self-contained page."""

from gradflow.report.draw import (
    FigureError as FigureError,
    FigureFile as FigureFile,
    draw_figures as draw_figures,
)
from gradflow.report.page import write_page as write_page
