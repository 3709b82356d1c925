"""Holders of named byte objects: a folder, memory, object storage."""
