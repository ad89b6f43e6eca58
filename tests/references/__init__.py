"""Methods written anew from their papers and the authors' code, sharing nothing with the package."""
