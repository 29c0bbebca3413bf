"""What a data folder is: scan, manifest, quality, splits, corrections, versions."""
