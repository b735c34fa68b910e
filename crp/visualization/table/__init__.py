"""The table that mining fills, on disk, and what is asked of it."""
