"""`ranktune compare`: methods, learning rates and seeds on the same data, at equal parameters, one JSON per run."""
