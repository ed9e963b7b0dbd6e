"""Studies of papers: each repeats a paper's experiments on packaged data and states which claims hold."""
