"""Published claims, run again: `python -m benchmarks.reproduce` writes docs/reproductions.md."""
