"""Builds from a checkout without what an earlier build left in build/, and with the compiled requests if that works.

All else is in pyproject.toml.
"""

import shutil

from setuptools import Extension, setup
from setuptools.command.build import build

COMPILED = "ttmfs/fuse/compiled_requests"


class CleanBuild(build):
    """A build that starts with empty directories.

    setuptools installs whatever lies in them, so a module that was removed since the last build would come back.
    """

    def run(self) -> None:
        """Empty them, then build."""
        for directory in self.build_lib, self.build_scripts:
            shutil.rmtree(directory, ignore_errors=True)
        super().run()


def compiled() -> list[Extension]:
    """The extension module. Optional: without a C compiler ttmfs is installed without it, and is slower."""

    def extension(suffix: str) -> Extension:
        return Extension("ttmfs.fuse.compiled_requests", [f"{COMPILED}.{suffix}"], optional=True)

    try:
        from Cython.Build import cythonize
    except ImportError:  # the sdist has the C that was made from it
        return [extension("c")]
    made: list[Extension] = cythonize([extension("pyx")], language_level=3)
    return made


setup(cmdclass={"build": CleanBuild}, ext_modules=compiled())
