"""What outlasts the daemon: the state of a mount, and the keeper of its descriptors."""
