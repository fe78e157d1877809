"""Samples completions for prompts: the sampler interface, and samplers for transformers models and vLLM."""
