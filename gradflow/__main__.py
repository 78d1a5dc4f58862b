"""`python -m gradflow` is the program `gradflow`."""

from gradflow.cli import main

main()
