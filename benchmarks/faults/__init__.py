"""Faults at random moments, and what must hold after each: `make faults`. `tests/faults` uses the same parts."""
