"""How a file becomes tensors and facts. One folder a modality."""
