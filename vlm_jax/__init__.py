"""vlm_jax: train, evaluate, sample and export LLaVA-family vision-language models on TPUs, GPUs and CPUs."""

__version__ = "0.1.0"
