"""Builds the package with colcon; ``pip install .`` at the top of the repository reads pyproject.toml instead.

``src``, ``launch``, ``params`` and ``tests`` are links to the top of the repository: data files must lie below the
directory of this file, and a package at the top would hide its siblings in a workspace.
"""

from glob import glob

from setuptools import find_packages, setup

NAME = "flashdrive_node"

setup(
    name=NAME,
    version="0.1.0",
    description="Real-time ROS 2 driving node around the Alpamayo 1.5 / R1 reasoning driving model",
    license="Apache-2.0",
    maintainer="The flashdrive_node authors",
    maintainer_email="maintainers@flashdrive-node.invalid",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={NAME: ["py.typed", "**/*.json", "**/*.html", "data/**/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", glob("launch/*.launch.py")),
        (f"share/{NAME}/params", [path for kind in ("yaml", "xml", "rviz") for path in glob(f"params/*.{kind}")]),
        (f"share/{NAME}/params/rigs", glob("params/rigs/*.yaml")),
    ],
    python_requires=">=3.11",
    # What rosdep installs is in package.xml; torch and transformers come from PyPI.
    install_requires=["setuptools"],
    # colcon test runs pytest only where a test requirement is declared.
    extras_require={"test": ["pytest"]},
    zip_safe=True,
    # Repeated from pyproject.toml: with --symlink-install only entry points named here get a console script.
    entry_points={
        "console_scripts": [
            "flashdrive = flashdrive_node.cli.main:main",
            "flashdrive_node = flashdrive_node.ros.main:main",
            "flashdrive_world = flashdrive_node.ros.world_node:main",
        ]
    },
)
