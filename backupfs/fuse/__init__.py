"""The view behind a kernel mount; alone imports pyfuse3."""
