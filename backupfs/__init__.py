"""Incremental, encrypted backups of files and whole disks, mounted as a read-only filesystem."""

__version__ = "0.1.0"
