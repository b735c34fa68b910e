"""The page on which a table is looked at."""
