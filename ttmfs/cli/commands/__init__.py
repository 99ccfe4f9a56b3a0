"""The commands of ``ttmfs``, for those who look after mounts: one module for those that belong together.

They stand on :mod:`ttmfs.client` and on what that stands on, and know nothing of the server. What takes long to import
is imported by the command that needs it, when it runs.
"""
