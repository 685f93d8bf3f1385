"""Models as files and as writers of text: checkpoints, Hugging Face folders, generation."""
