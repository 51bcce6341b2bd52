"""Data sets: where their clips are (folders, lists, shards) and what is said of them (labels, weights)."""
