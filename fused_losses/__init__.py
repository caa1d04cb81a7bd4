"""Losses of language-model training that never hold ``tokens × vocabulary`` logits."""
