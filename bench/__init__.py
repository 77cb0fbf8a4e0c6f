"""Benchmarks of fastwire and of the servers and libraries it is compared with."""
