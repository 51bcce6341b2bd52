"""What `benchmarks/learning.py` is made of: clips and budget, one run, the claims and how they are judged, tables."""
