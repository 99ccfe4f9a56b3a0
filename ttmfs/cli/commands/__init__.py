"""The commands of ``ttmfs``.

They import :mod:`ttmfs.client` and its dependencies, and nothing of the server. Imports that take long happen in the
functions that need them.
"""
