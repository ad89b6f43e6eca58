"""What the axes stand on: weights and their masks, groups of them, which they are, exact selection, names, files."""
