"""Text to tokens: sources, sequences drawn from them, and text the model writes itself."""
