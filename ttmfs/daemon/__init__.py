"""The life of a mount: made, served, taken over, ended."""
