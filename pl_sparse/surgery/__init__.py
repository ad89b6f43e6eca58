"""Channels and heads taken out of a network: what goes (plan), whether it may (trial), and that it went (shrink)."""
