"""The command line: words to calls, events to text or JSON, errors to exit codes."""
