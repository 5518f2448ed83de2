"""In-context linear regression by one layer of multi-head softmax attention (arXiv 2503.12734)."""
