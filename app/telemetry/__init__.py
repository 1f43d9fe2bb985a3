"""What the service tells of itself: metrics, logs, traces. docs/observability.md describes all three."""
