"""How good a model is, and whether it is promoted: evaluation, gate, reports."""
