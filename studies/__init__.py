"""Studies shaped like papers: each carries out its experiments on packaged data and says what held."""
