"""Text to ids and masks: tokenizers, chat formats, file formats, batches."""
