"""A checkpoint on the Hugging Face Hub: ``card`` writes its model card, ``push`` uploads it."""
