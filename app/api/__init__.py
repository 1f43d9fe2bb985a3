"""HTTP, one module a surface: `classify`, `health`, `problems` (failures)."""
