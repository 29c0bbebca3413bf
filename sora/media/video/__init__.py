"""Video: decoding with PyAV, clips, signatures."""
