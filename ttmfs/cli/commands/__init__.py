"""The commands of ``ttmfs``. A module with a tuple ``COMMANDS`` has commands; the others help them.

They import :mod:`ttmfs.client` and its dependencies, and nothing of the server. Imports that take long happen in the
functions that need them.
"""
