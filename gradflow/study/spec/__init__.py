"""Specs of studies: what a TOML file may say, checked."""
