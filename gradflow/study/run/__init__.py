"""Running a study and keeping what it leaves."""
