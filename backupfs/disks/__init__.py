"""Disks as sources: what they are called, how their bytes are read, how they are divided."""
