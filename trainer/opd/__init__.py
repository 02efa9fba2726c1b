"""On-policy distillation: the student samples, the teacher scores, the trainer moves the student (docs/opd.md)."""
