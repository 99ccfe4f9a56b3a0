"""Where backups lie: the directory of their files, its budget, and what may wait for it."""
