"""Models, and how they take pictures, by name: as a command line or a table says them."""
