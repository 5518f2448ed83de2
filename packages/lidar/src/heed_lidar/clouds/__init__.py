"""Point clouds: what one is, and the files that hold them."""
