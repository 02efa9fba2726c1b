"""The embedded default: a sample of SYNTH-schema rows, a tiny teacher and a run of the whole river on an ordinary CPU."""
