"""The command line."""

from gradflow.cli.app import main as main
