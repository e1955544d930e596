"""What a pipeline does: generate, interpolate, invert, edit. Each takes the pipeline first and is a method of it."""
