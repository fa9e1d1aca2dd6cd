"""A checkpoint opened and checked: files, configuration, tensor headers, tokenizer, chat template; no conversion."""
