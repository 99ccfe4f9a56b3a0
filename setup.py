"""Builds from a checkout without what an earlier build left in build/. All else is in pyproject.toml."""

import shutil

from setuptools import setup
from setuptools.command.build import build


class CleanBuild(build):
    """A build that starts with empty directories.

    setuptools installs whatever lies in them, so a module that was removed since the last build would come back.
    """

    def run(self) -> None:
        """Empty them, then build."""
        for directory in self.build_lib, self.build_scripts:
            shutil.rmtree(directory, ignore_errors=True)
        super().run()


setup(cmdclass={"build": CleanBuild})
