"""Around the method: checks before it, the folder of its results, its data, memory and teachers."""
