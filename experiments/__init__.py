"""Studies with their results, one folder each, the workloads they share, and benchmarks."""
