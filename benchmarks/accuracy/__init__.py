"""Accuracy: cross-validation, the gate, and a project's life over many nights."""
