"""Device side of edgeprune: loads a bundle with ONNX Runtime, runs it, checks it and measures it. No torch.

Importing it says no to ONNX Runtime's telemetry, unless the environment has an answer of its own. On Linux, from 1.29
on, ONNX Runtime reports the process and every model to its makers, and keeps the reports in the user's cache folder. It
asks the environment as it is imported, so a later call is too late.
"""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
