"""A folder that an export made: manifest, files, tokenizer, chat template, and where it lies. Knows no engine."""
