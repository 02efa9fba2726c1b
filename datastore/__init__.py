"""vpmoe-data: SYNTH to packed shards to teacher targets. The river, one file a stage; read types.py first."""
