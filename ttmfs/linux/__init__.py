"""Linux as this project needs it: system calls that Python lacks, mounts, memory and swap."""
