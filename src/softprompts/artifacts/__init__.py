"""Trained prompts on disk: the artifact, its files, collections of several, and arithmetic on prompts."""
