"""One file per verb; no printing: progress is events."""
