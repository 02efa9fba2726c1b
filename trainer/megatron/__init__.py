"""The only place that imports Megatron-Core: its 0.16.1 is used unmodified, our modules enter by specs.

Megatron warns at import of every optional package that it lacks and logs its optimizer's whole config; the run's own
config says which implementation is used, so only its warnings in the log remain.
"""

import logging
import warnings

logging.getLogger("megatron").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"megatron\.")
