"""Whether runs agree, with errors and a verdict."""
