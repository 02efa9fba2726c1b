"""The student for Hugging Face transformers: files that `vpmoe-train export` copies beside the weights."""
