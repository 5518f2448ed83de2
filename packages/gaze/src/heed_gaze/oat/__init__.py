"""OAT, the Object-level Attention Transformer (arXiv 2407.13335), from shelves to scanpaths."""
