"""The one loss of training, its fused function, and what is logged of it."""
