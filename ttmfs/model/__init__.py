"""Backups and their pages: the verbs, and backups by name. Nothing here depends on FUSE."""
