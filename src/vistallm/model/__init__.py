"""Batches -> losses or answers: encoder, instruction-guided tokenizer, decoder."""
