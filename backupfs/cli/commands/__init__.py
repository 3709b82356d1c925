"""The verbs, grouped by what they work on. Each imports what is heavy only when it runs."""
