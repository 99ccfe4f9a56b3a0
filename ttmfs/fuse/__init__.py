"""What the kernel talks to: names, attributes, requests and their counts."""
