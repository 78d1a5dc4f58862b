"""Running a dynamics on a problem: the one way in."""
