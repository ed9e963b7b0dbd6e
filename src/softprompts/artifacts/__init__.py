"""What a trained prompt is on disk: the artifact, its files, collections, and arithmetic on prompts."""
