"""Procedures of more than one fit: their stages are directories, reused where they are finished."""
