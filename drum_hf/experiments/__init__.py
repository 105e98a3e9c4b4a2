"""The experiments of this project: the demo, suites, reports and benchmarks."""
