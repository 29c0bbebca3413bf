"""What good data is: rules over the manifest, the quarantine, and the pages that show the result."""

from sora.dataset.quality.validation import Finding, Judgement, ValidationReport, judge, validate

__all__ = ["Finding", "Judgement", "ValidationReport", "judge", "validate"]
