"""The checkpoint run by transformers in float32, at once or layer by layer; nothing here is written to an artifact."""
