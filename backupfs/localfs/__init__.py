"""The files of this machine: what to back up, reading and writing it."""
