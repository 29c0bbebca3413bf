"""Speed and memory of everything up to a trained model."""
