"""What runs the runs of a sweep: going on after a kill, sharing what runs have in common, telling how far they are."""
