"""From a request to a trained student."""
