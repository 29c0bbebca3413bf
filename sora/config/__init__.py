"""params.yaml: every setting with its default and range, presets, and the paths of a project."""
