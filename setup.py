"""Only what pyproject.toml cannot say: the top-level folder ``conf/`` travels as package data of the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["nemo_aligner_diffusion", "nemo_aligner_diffusion.*"]),
        "nemo_aligner_diffusion.conf",
    ],
    package_dir={"nemo_aligner_diffusion.conf": "conf"},
    package_data={
        "nemo_aligner_diffusion": [
            "py.typed",
            "assets/*",
            "assets/**/*",
            "evaluation/report/page.*",
            "diffusion/architectures.yaml",
        ],
        "nemo_aligner_diffusion.conf": ["*.yaml", "**/*.yaml"],
    },
)
