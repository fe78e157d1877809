"""Student and teacher: loading, tokenizers, placement."""
