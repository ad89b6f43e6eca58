"""Other trainers and services."""
