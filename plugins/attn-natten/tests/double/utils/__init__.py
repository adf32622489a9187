"""Tools of the double."""
