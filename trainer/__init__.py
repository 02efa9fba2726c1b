"""vpmoe-train: streams packed rows and teacher targets into distillation runs of the student."""
