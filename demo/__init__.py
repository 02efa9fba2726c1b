"""The embedded default: a sample in the SYNTH schema, a tiny teacher, and the whole river on an ordinary CPU."""
