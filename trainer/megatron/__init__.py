"""The only place that imports Megatron-Core: its 0.16.1 is used unmodified, our modules enter by specs."""
