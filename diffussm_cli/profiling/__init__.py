"""What a model costs, before and after it is run."""
