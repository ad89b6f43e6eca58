"""Modules that this project did not write, trained to be sparse one after the other."""
