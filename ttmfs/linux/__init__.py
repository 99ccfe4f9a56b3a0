"""Interfaces to Linux: system calls that Python lacks, mounts, memory and swap."""
