"""How fast, and in how much memory, softprompts trains and scores: interleaved with PEFT, and against the floor.

`python -m benchmarks` measures everything, `python -m benchmarks table` shows what was measured. Not part of the wheel.
"""
