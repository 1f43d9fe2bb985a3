"""From the artifact to logits: `artifact` (verify, read), `session` (onnxruntime), `scheduler` (queue, batches, deadlines)."""
