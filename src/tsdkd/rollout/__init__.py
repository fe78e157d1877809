"""Completions for prompts: what a sampler is, and the student, teacher and vLLM as samplers."""
