"""Callbacks of the application: how far a run is, what it logged, where it goes on."""
