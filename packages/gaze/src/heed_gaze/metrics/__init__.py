"""How alike scanpaths are, and how well maps predict fixations: one family of scores per file."""
