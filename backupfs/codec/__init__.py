"""Pure transformations of bytes: compression, sealing, keys."""
