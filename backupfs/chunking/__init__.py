"""Cutting content into chunks."""
