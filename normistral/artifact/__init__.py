"""A folder that an export made: manifest, files, tokenizer, chat template, and the store of them. Knows no engine."""
