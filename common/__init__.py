"""Shared ground: config, errors, files, tokenizer, provenance, logging. Imports no torch and no vllm."""
