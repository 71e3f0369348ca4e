"""Commands of the `linflab` command line."""
