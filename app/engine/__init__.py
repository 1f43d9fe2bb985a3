"""From the artifact to logits."""
