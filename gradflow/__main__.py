"""`python -m gradflow` is the program `gradflow`."""

from gradflow.cli.app import main

main()
