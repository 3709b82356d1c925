"""Snapshots as a read-only file system, without a word of FUSE."""
