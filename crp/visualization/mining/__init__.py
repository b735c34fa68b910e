"""One pass over a data set: reading, attributing, scoring, writing."""
