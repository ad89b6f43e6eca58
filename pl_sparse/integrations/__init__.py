"""Other trainers and services. Each module needs its package, and is imported by its own name."""
