"""HTTP, one module a surface; `problems` is the failures of all."""
