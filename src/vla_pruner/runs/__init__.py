"""Many episodes: the matrix of a run, what runs it, and where finished ones are kept."""
