"""The Open Inference Protocol v2, as KServe, Triton and their clients speak it."""
