"""What pyproject.toml cannot say: a wheel carries the configs, inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ to fpn_ext/configs/, where an installed package finds them.

    An editable install finds them in the checkout (fpn_ext/files/shipped.py).
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "fpn_ext", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(__file__).parent / "configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
