"""Training, cross-validation, and the audit of labels."""
