"""Channels and heads taken out of a network."""
