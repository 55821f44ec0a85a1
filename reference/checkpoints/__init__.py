"""Reading Hugging Face model directories."""
