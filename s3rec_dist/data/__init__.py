"""From raw interactions to reconstructed training batches."""
