"""Rows of text to rows of token ids: reading and checking files, the datasets, and the collator that packs a batch."""
