"""What is read: documents, tokenizer, tokens, windows, and the groups that resampling draws."""
