"""Fine-tune GPT-2 on your own text and generate from it."""
