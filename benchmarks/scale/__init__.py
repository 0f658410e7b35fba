"""The grid of evidence: recipes against dense Muon over replicas, intervals, data, sizes and lengths.

python -m benchmarks.scale replicas
"""
