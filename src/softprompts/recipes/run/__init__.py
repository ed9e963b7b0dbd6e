"""One run from its configuration to artifact, results and page."""
