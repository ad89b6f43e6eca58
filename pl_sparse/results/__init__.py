"""Results: the summary and the figures of a run, and the comparison of several runs."""
