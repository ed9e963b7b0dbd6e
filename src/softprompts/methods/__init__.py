"""The methods: each makes one task's prompt. One file a method; `registry` finds them by name."""

from softprompts.methods.registry import (
    METHODS,
    build,
    check_site,
    find,
    groups,
    names,
    sentence_encoders,
    shares,
    state_of,
)

__all__ = ["METHODS", "build", "check_site", "find", "groups", "names", "sentence_encoders", "shares", "state_of"]
