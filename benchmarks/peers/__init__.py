"""Other networks on the same folds, for the same time."""
