"""Data versions and the preprocessing pipeline, by DVC."""
