"""Load, latency and flood benchmarks for fastwire and the servers it is compared with."""
